"""One packed linear against the memory bandwidth of this machine, and against other libraries.
Makes the two tables of one linear at batch 1 in docs/serving.md (bench/results/linear.json).

    python bench/kernels/linear.py [--schemes int4 nf4] [--peers torchao bitsandbytes] [--turns 3] [--json out.json]

Machines are shared and noisy, so everything is a ratio within one run: a plain read of as many bytes, the packed product and
torch's float product take turns, each over enough copies of the weight to leave the cache, and medians are compared. A peer
runs in a process of its own with the same shapes and copies; its rate counts the bytes of its own packed weight. With `--turns`
everything is measured so often, ours and then each peer, and medians of the turns are kept: load then falls on all alike.
llama.cpp has no public call of one linear; kernels/decode.py compares it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ENVIRONMENTS, Row, arguments, in_turns, medians, say_machine, write_json
from peers.environments import rows_of
from peers.time_linear import CACHE_BYTES, MAKERS

from fracbit.kernels import PackedLinear
from fracbit.kernels.cpu import NATIVE
from fracbit.numerics import quantize_tensor, stored_bits
from fracbit.records.scheme import Scheme

SHAPES = ((4096, 4096), (11008, 4096))
SCHEMES = {f"{dtype}{bits}": Scheme(dtype, bits, 64) for dtype, bits in (
    ("int", 4), ("nf", 4), ("kmeans", 4), ("kmeans:row", 4), ("int", 3), ("nf", 3), ("int", 2), ("int", 8),
)}  # fmt: skip
PATHS = ("int8", "float")


def rate(seconds: list[float], count: float, quantile: float = 0.5) -> float:
    """GB/s at a quantile of the times."""
    return count / sorted(seconds)[int(len(seconds) * quantile)] / 1e9


def measure(shape: tuple[int, int], scheme: Scheme, rounds: int, batch: int) -> Row:
    """Our kernel on both paths beside a plain read of the same bytes and torch's bf16 product."""
    rows, columns, threads = *shape, torch.get_num_threads()
    first = quantize_tensor(torch.randn(rows, columns) * 0.02, scheme)
    size = stored_bits(first) / 8
    copies = max(2, int(CACHE_BYTES // size))
    weights = [replace(first, codes=first.codes.clone(), scales=first.scales.clone()) for _ in range(copies)]
    x = torch.randn(batch, columns)
    raw = [torch.zeros(int(size), dtype=torch.uint8).random_() for _ in range(copies)]
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(2)]
    calls = {"read": [partial(NATIVE.read, r, threads) for r in raw]}
    calls |= {path: [partial(PackedLinear(w, path), x) for w in weights] for path in PATHS}
    calls["torch bf16"] = [partial(torch.nn.functional.linear, x.bfloat16(), w) for w in dense]
    seconds = in_turns(calls, rounds)
    read = {quantile: rate(seconds["read"], size, quantile) for quantile in (0.5, 0.1)}
    result: Row = {
        "rows": rows, "columns": columns, "scheme": f"{scheme.dtype}{scheme.bits}/64 {scheme.axis}", "batch": batch,
        "threads": threads, "bytes": size, "read_GBps": read[0.5],
        "bf16_us": statistics.median(seconds["torch bf16"]) * 1e6,
    }  # fmt: skip
    for path in PATHS:
        median, best = rate(seconds[path], size), rate(seconds[path], size, 0.1)
        result |= {
            f"{path}_us": statistics.median(seconds[path]) * 1e6, f"{path}_GBps": median,
            f"{path}_fraction": median / read[0.5], f"{path}_fraction_best": best / read[0.1],
        }  # fmt: skip
    return result


def own(given: argparse.Namespace) -> list[Row]:
    """All schemes and shapes, printed as they come; integers and nf of 4 bits along the output too."""
    print(f"{'shape':>12} {'scheme':>18} {'read GB/s':>9} | int8: us  GB/s  fraction (best) |"
          " float: us  GB/s  fraction (best) | bf16 us")  # fmt: skip
    schemes = [replace(SCHEMES[name], axis=axis) for name in given.schemes
               for axis in (("in", "out") if name in ("int4", "nf4") else ("in",))]  # fmt: skip
    results = []
    for shape in given.shapes:
        for scheme in schemes:
            row = measure(shape, scheme, given.rounds, given.batch)
            results.append(row)
            paths = " | ".join(f"{row[p + '_us']:7.0f} {row[p + '_GBps']:5.1f} {row[p + '_fraction']:.2f} "
                               f"({row[p + '_fraction_best']:.2f})" for p in PATHS)  # fmt: skip
            print(f"{row['rows']:>6}x{row['columns']:<5} {row['scheme']:>18} {row['read_GBps']:9.1f} | {paths} "
                  f"| {row['bf16_us']:.0f}", flush=True)  # fmt: skip
    return results


def peer(name: str, given: argparse.Namespace) -> list[Row]:
    words = (given.rounds, given.batch, *("x".join(map(str, shape)) for shape in given.shapes))
    results = rows_of(name, "time_linear.py", (name, *words), given.environments, torch.get_num_threads())
    for row in results:
        speed = f"{row['us']:8.0f} us {row['GBps']:6.1f} GB/s of packed bytes"
        print(f"{row['rows']:>6}x{row['columns']:<5} {row['name']:>28} {speed}")
    return results


def main() -> None:
    parser = arguments(
        __doc__, {"peers": MAKERS}, rounds=10, shapes=SHAPES, threads=torch.get_num_threads(),
        peers=[], environments=ENVIRONMENTS, json=None,
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--turns", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    say_machine()
    ours: list[Row] = []
    theirs: list[Row] = []
    for _ in range(given.turns):
        ours += own(given)
        theirs += (row for name in given.peers for row in peer(name, given))
    own_rows, peer_rows = (
        medians(ours, ("rows", "columns", "scheme")),
        medians(theirs, ("rows", "columns", "name")),
    )
    write_json(given.json, {"turns": given.turns, "own": own_rows, "peers": peer_rows})


if __name__ == "__main__":
    main()
