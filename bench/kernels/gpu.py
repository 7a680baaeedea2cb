"""One packed linear on a GPU against its memory bandwidth, and against bitsandbytes, torchao and HQQ where they are installed.

    python bench/kernels/gpu.py [--json out.json]

NOT RUN YET: no GPU was at hand when this was written, so nothing here has been measured and no number of it stands anywhere
in the documentation. What it is to show: at batch 1 and 4 bits, 4096 x 4096 and larger, at least 75 % of the bandwidth that a
plain read of as many bytes reaches, and less time than each of the others takes for the same shape in the same run.

Times are of CUDA events over copies of the weight that together exceed the cache, the calls taking turns; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fracbit.kernels import PackedLinear, reference
from fracbit.numerics import quantize_tensor, stored_bits
from fracbit.records.scheme import Scheme

COPIES_BYTES = 400e6  # several times the second-level cache of an H100
SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
SCHEMES = (
    Scheme("int", 4, 64), Scheme("nf", 4, 64), Scheme("kmeans", 4, 64), Scheme("int", 4, 64, "out"), Scheme("int", 3, 64),
    Scheme("int", 2, 64),
)  # fmt: skip

Maker = Callable[[torch.Tensor], tuple[Callable[[torch.Tensor], torch.Tensor], float]]


def own(scheme: Scheme, weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    packed = quantize_tensor(weight.float().cpu(), scheme).to("cuda")
    linear = PackedLinear(packed)
    x = torch.randn(2, weight.shape[1], device="cuda")
    wrong = (linear(x) - reference.linear(x, packed)).norm() / reference.linear(x, packed).norm()
    assert wrong < 1e-3, f"{scheme}: the kernel is off by {float(wrong):.1e}"
    return linear, stored_bits(packed) / 8


def bitsandbytes(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], False, torch.bfloat16, False, "nf4")
    layer.load_state_dict({"weight": weight})
    return layer.cuda(), weight.numel() * (0.5 + 4 / 64)


def torchao(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], False, "cuda", torch.bfloat16)
    layer.weight.data = weight.clone()
    quantize_(layer, Int4WeightOnlyConfig(group_size=64))
    return layer, weight.numel() * (0.5 + 4 / 64)


def hqq(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], False, "cuda", torch.bfloat16)
    layer.weight.data = weight.clone()
    how = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(layer, how, compute_dtype=torch.bfloat16, device="cuda"), weight.numel() * (0.5 + 4 / 64)


def plain(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    return partial(torch.nn.functional.linear, weight=weight.clone()), weight.numel() * 2


def makers() -> Iterator[tuple[str, Maker]]:
    yield from ((f"fracbit {scheme} {scheme.axis}", partial(own, scheme)) for scheme in SCHEMES)
    yield "torch bf16", plain
    peers: tuple[tuple[str, Maker], ...] = (
        ("bitsandbytes", bitsandbytes),
        ("torchao", torchao),
        ("hqq", hqq),
    )
    yield from ((name, make) for name, make in peers if find_spec(name))


def microseconds(calls: list[Callable[[], object]], rounds: int) -> float:
    """Median time of a call; the copies take turns, the first round warms up."""
    times = []
    for number in range(rounds + 1):
        for call in calls:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if number:
                times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


@torch.inference_mode()
def measure(name: str, make: Maker, shape: tuple[int, int], batch: int, rounds: int) -> dict[str, Any]:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    first, size = make(weight)
    layers = [first, *(make(weight)[0] for _ in range(max(1, int(COPIES_BYTES // size)) - 1))]
    x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
    raw = [torch.zeros(int(size) // 4, device="cuda") for _ in layers]
    took = microseconds([partial(layer, x) for layer in layers], rounds)
    read = microseconds([one.sum for one in raw], rounds)
    return {
        "name": name,
        "shape": list(shape),
        "batch": batch,
        "us": took,
        "GBps": size / took / 1e3,
        "share": read / took,
    }


def main() -> None:
    """Measure everything that is installed, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; this measures the Triton kernel on one")
    rows = []
    print(f"{torch.cuda.get_device_name()}, batch {arguments.batch}; share: of a plain read of as many bytes")
    for shape in SHAPES:
        for name, make in makers():
            rows.append(measure(name, make, shape, arguments.batch, arguments.rounds))
            r = rows[-1]
            print(
                f"{shape[0]:>6}x{shape[1]:<6} {name:<28} {r['us']:8.1f} us {r['GBps']:7.0f} GB/s  {r['share']:.2f}",
                flush=True,
            )
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
