"""What other libraries take for one linear. Run by kernels/linear.py in a peer's environment; prints rows as JSON.

python time_linear.py NAME ROUNDS BATCH 4096x4096 ...
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from frame import in_turns, versions
from peers.packs import PACKS, Pack
from torch import nn

CACHE_BYTES = 96e6
BF16 = torch.bfloat16
Made = tuple[
    Callable[[torch.Tensor], object], float, torch.dtype
]  # a product, the bytes of its weight, the inputs' type
Maker = Callable[[int, int], Made]


def plain(dtype: torch.dtype, rows: int, columns: int) -> Made:
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    return layer, layer.weight.numel() * layer.weight.element_size(), dtype


def torch_int8(rows: int, columns: int) -> Made:
    weight = torch.randint(-127, 127, (rows, columns), dtype=torch.int8)
    scale = torch.ones(rows, dtype=BF16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scale), rows * columns, BF16


def torch_int4(rows: int, columns: int) -> Made:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = torch.ones(columns // 64, rows, 2, dtype=BF16)
    size = rows * columns * (0.5 + 4 / 64)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 64, scale), size, BF16


def gptqmodel(rows: int, columns: int) -> Made:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4, group_size=64, sym=True, desc_act=False, in_features=columns, out_features=rows, bias=False,
        pack_dtype=torch.int32,
    )  # fmt: skip
    layer.qweight.random_()
    layer.scales.fill_(0.01)
    layer.post_init()
    return layer.eval(), rows * columns * (0.5 + 2.5 / 64), BF16


def packed(pack: Pack, size: float, rows: int, columns: int) -> Made:
    holder = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=BF16))
    pack(holder)
    return holder, rows * columns * size, BF16


MAKERS: dict[str, dict[str, Maker]] = {}
for peer, packs in PACKS.items():
    MAKERS[peer] = {name: partial(packed, pack, size) for name, (pack, size) in packs.items()}
MAKERS["torch"] = {str(dtype): partial(plain, dtype) for dtype in (torch.float32, BF16)}
MAKERS["torch"] |= {"torch int8 weight-only": torch_int8, "torch int4/64 weight-only": torch_int4}
MAKERS["gptqmodel"] = {"gptqmodel int4/64 torch": gptqmodel}


@torch.inference_mode()
def measure(make: Maker, rows: int, columns: int, rounds: int, batch: int) -> tuple[float, float]:
    """Median seconds over enough copies to leave the cache, and the bytes of one."""
    layer, size, dtype = make(rows, columns)
    layers = [layer] + [make(rows, columns)[0] for _ in range(max(1, int(CACHE_BYTES // size)) - 1)]
    x = torch.randn(batch, columns, dtype=dtype)
    return statistics.median(in_turns({"": [partial(one, x) for one in layers]}, rounds)[""]), size


def main() -> None:
    peer, rounds, batch, *shapes = sys.argv[1:]
    results, found = [], versions("torch", peer)
    for name, make in MAKERS[peer].items():
        for shape in shapes:
            rows, columns = map(int, shape.split("x"))
            try:
                seconds, size = measure(make, rows, columns, int(rounds), int(batch))
            except (
                RuntimeError,
                NotImplementedError,
                AttributeError,
                TypeError,
            ) as error:  # a path that is missing here
                print(f"{name} {shape}: {error}", file=sys.stderr)
                continue
            results.append({"name": name, "rows": rows, "columns": columns, "us": seconds * 1e6,
                            "GBps": size / seconds / 1e9, "versions": found})  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
