"""Many rows of activations through one packed linear, by rows of codes and by tiles of decoded weights, beside torch's product.
Makes the table of prompts in docs/serving.md.

    python bench/kernels/prefill.py [--shapes 1024x1024 2048x5632] [--isa avx2]

`kernels/cpu.py` takes the way that is faster here; `tiles_from` holds what this printed. Everything takes turns within one run,
and medians are divided by that of torch's product of the same type with a plain weight.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import arguments, in_turns, say_machine

from fracbit.kernels import cpu
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

SCHEMES = (Scheme("int", 4), Scheme("nf", 4), Scheme("int", 4, axis="out"), Scheme("int", 3, offset="zero"))
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@torch.inference_mode()
def measure(weight: cpu.CpuWeight, x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Times of each way as a share of torch's."""
    plain = torch.randn(weight.rows, weight.columns, dtype=x.dtype)
    y, threads = x.new_empty((len(x), weight.rows)), torch.get_num_threads()
    calls = {
        "torch": lambda: torch.nn.functional.linear(x, plain),
        "tiles": lambda: cpu._by_tiles(weight, x, y),
        "rows, float": lambda: weight.weight.multiply(x, y, False, threads),
        "rows, int8": lambda: weight.weight.multiply(x, y, True, threads),
    }
    seconds = in_turns({name: [call] for name, call in calls.items()}, rounds)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return {name: each / middle["torch"] for name, each in middle.items() if name != "torch"}


def main() -> None:
    parser = arguments(__doc__, rounds=5, shapes=[(1024, 1024), (2048, 5632)])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 512])
    parser.add_argument("--isa", default="", help="an instruction set instead of the best one")
    given = parser.parse_args()
    say_machine()
    print(f"time as a share of torch's own product; kernels for {given.isa or 'the best instruction set'}")
    for shape in given.shapes:
        for scheme in SCHEMES:
            weight = cpu.prepare(quantize_tensor(torch.randn(shape) * 0.02, scheme), "float", given.isa)
            for dtype in DTYPES:
                for rows in given.rows:
                    found = measure(weight, torch.randn(rows, shape[1], dtype=dtype), given.rounds)
                    shares = "  ".join(f"{name} {share:.2f}" for name, share in found.items())
                    name = f"{shape[0]}x{shape[1]} {scheme} {str(dtype)[6:]} {rows} rows"
                    print(f"{name:<42} {shares}", flush=True)


if __name__ == "__main__":
    main()
