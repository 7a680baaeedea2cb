"""What other libraries take for the same linear. Run by linear.py inside the environment of one peer; prints JSON.

python peers.py NAME ROUNDS BATCH 4096x4096 ...
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

CACHE_BYTES = 96e6

Maker = Callable[[int, int], tuple[torch.nn.Module, float, torch.dtype]]


def plain(rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows, bias=False).to(dtype)


def torch_peers() -> Iterator[tuple[str, Maker]]:
    for dtype in (torch.float32, torch.bfloat16):
        size = torch.finfo(dtype).bits / 8
        yield (
            str(dtype),
            lambda rows, columns, d=dtype, s=size: (plain(rows, columns, d), rows * columns * s, d),
        )

    class Int8(torch.nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight = torch.randint(-127, 127, (rows, columns), dtype=torch.int8)
            self.scale = torch.ones(rows, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)

    class Int4(torch.nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.scale = torch.ones(columns // 64, rows, 2, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, 64, self.scale)

    yield (
        "torch int8 weight-only",
        lambda rows, columns: (Int8(rows, columns), rows * columns, torch.bfloat16),
    )
    yield (
        "torch int4/64 weight-only",
        lambda rows, columns: (Int4(rows, columns), rows * columns * 0.5625, torch.bfloat16),
    )


def torchao_peers() -> Iterator[tuple[str, Maker]]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def make(rows: int, columns: int) -> tuple[torch.nn.Module, float, torch.dtype]:
        holder = torch.nn.Sequential(plain(rows, columns, torch.bfloat16))
        quantize_(holder, Int8WeightOnlyConfig())
        return holder, rows * columns, torch.bfloat16

    yield "torchao int8 weight-only", make


def bitsandbytes_peers() -> Iterator[tuple[str, Maker]]:
    import bitsandbytes as bnb

    def make(rows: int, columns: int) -> tuple[torch.nn.Module, float, torch.dtype]:
        layer = bnb.nn.Linear4bit(
            columns,
            rows,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=False,
        )
        layer.load_state_dict({"weight": torch.randn(rows, columns, dtype=torch.bfloat16)})
        return layer.to("cpu").eval(), rows * columns * (0.5 + 4 / 64), torch.bfloat16

    yield "bitsandbytes nf4/64", make


def quanto_peers() -> Iterator[tuple[str, Maker]]:
    from optimum.quanto import freeze, qint4, qint8, quantize

    def make(weights: object, size: float) -> Maker:
        def build(rows: int, columns: int) -> tuple[torch.nn.Module, float, torch.dtype]:
            holder = torch.nn.Sequential(plain(rows, columns, torch.bfloat16))
            quantize(holder, weights=weights)
            freeze(holder)
            return holder, rows * columns * size, torch.bfloat16

        return build

    yield "quanto int8", make(qint8, 1.0)
    yield "quanto int4/128", make(qint4, 0.5 + 4 / 128)


def gptqmodel_peers() -> Iterator[tuple[str, Maker]]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def make(rows: int, columns: int) -> tuple[torch.nn.Module, float, torch.dtype]:
        layer = TorchLinear(
            bits=4,
            group_size=64,
            sym=True,
            desc_act=False,
            in_features=columns,
            out_features=rows,
            bias=False,
            pack_dtype=torch.int32,
        )
        layer.qweight.random_()
        layer.scales.fill_(0.01)
        layer.post_init()
        return layer.eval(), rows * columns * (0.5 + 2.5 / 64), torch.bfloat16

    yield "gptqmodel int4/64 torch", make


def llama_peers() -> Iterator[tuple[str, Maker]]:
    raise SystemExit(
        "llama-cpp-python has no public single-linear call; it is compared per token by bench/kernels/decode.py"
    )
    yield


PEERS = {
    "torch": torch_peers, "torchao": torchao_peers, "bitsandbytes": bitsandbytes_peers, "optimum-quanto": quanto_peers,
    "gptqmodel": gptqmodel_peers, "llama-cpp-python": llama_peers,
}  # fmt: skip


@torch.inference_mode()
def measure(make: Maker, rows: int, columns: int, rounds: int, batch: int) -> tuple[float, float]:
    layer, size, dtype = make(rows, columns)
    layers = [layer] + [make(rows, columns)[0] for _ in range(max(1, int(CACHE_BYTES // size)) - 1)]
    x = torch.randn(batch, columns, dtype=dtype)
    seconds = []
    for number in range(rounds + 1):
        for one in layers:
            start = time.perf_counter()
            one(x)
            if number:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), size


def main() -> None:
    name, rounds, batch, *shapes = sys.argv[1:]
    results = []
    for label, make in PEERS[name]():
        for shape in shapes:
            rows, columns = map(int, shape.split("x"))
            try:
                seconds, size = measure(make, rows, columns, int(rounds), int(batch))
            except (
                RuntimeError,
                NotImplementedError,
                AttributeError,
                TypeError,
            ) as error:  # a path the peer lacks here
                print(f"{label} {shape}: {error}", file=sys.stderr)
                continue
            results.append(
                {
                    "name": label,
                    "rows": rows,
                    "columns": columns,
                    "us": seconds * 1e6,
                    "GBps": size / seconds / 1e9,
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
