"""Many rows of activations through one packed linear, by rows of codes and by tiles of decoded weights, beside torch's product.

    python bench/kernels/prefill.py [--shapes 1024x1024 2048x5632] [--isa avx2]

`kernels/cpu.py` takes the way that is faster here; `tiles_from` holds what this printed. Everything takes turns within one run,
and medians are divided by that of torch's product of the same type with a plain weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fracbit.kernels import cpu
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

SCHEMES = (
    Scheme("int", 4, 64),
    Scheme("nf", 4, 64),
    Scheme("int", 4, 64, "out"),
    Scheme("int", 3, 64, offset="zero"),
)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every call; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def measure(weight: cpu.CpuWeight, x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Times of each way as a share of torch's."""
    plain = torch.randn(weight.rows, weight.columns, dtype=x.dtype)
    y, threads = x.new_empty((len(x), weight.rows)), torch.get_num_threads()
    found = in_turns(
        {
            "torch": lambda: torch.nn.functional.linear(x, plain),
            "tiles": lambda: cpu._by_tiles(weight, x, y),
            "rows, float": lambda: weight.weight.multiply(x, y, False, threads),
            "rows, int8": lambda: weight.weight.multiply(x, y, True, threads),
        },
        rounds,
    )
    return {name: seconds / found["torch"] for name, seconds in found.items() if name != "torch"}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 512])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda s: tuple(map(int, s.split("x"))),
        default=[(1024, 1024), (2048, 5632)],
    )
    parser.add_argument("--isa", default="", help="an instruction set instead of the best one")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; time as a share of torch's own product of the same type")
    for shape in arguments.shapes:
        for scheme in SCHEMES:
            weight = cpu.prepare(quantize_tensor(torch.randn(shape) * 0.02, scheme), "float", arguments.isa)
            for dtype in DTYPES:
                for rows in arguments.rows:
                    found = measure(weight, torch.randn(rows, shape[1], dtype=dtype), arguments.rounds)
                    shares = "  ".join(f"{name} {share:.2f}" for name, share in found.items())
                    name = f"{shape[0]}x{shape[1]} {scheme} {str(dtype)[6:]} {rows} rows"
                    print(f"{name:<42} {shares}", flush=True)


if __name__ == "__main__":
    main()
