"""One packed linear against the memory bandwidth of this machine, and against other libraries.

    python bench/kernels/linear.py                               our kernels beside a plain read of the same bytes
    python bench/kernels/linear.py --peers torchao bitsandbytes  each installed into an environment of its own and measured
    python bench/kernels/linear.py --schemes int4 nf4 --peers bitsandbytes --turns 3 --json out.json

Machines are shared and noisy, so everything is a ratio within one run: a plain read of as many bytes, the packed product and
torch's float product take turns, each over enough copies of the weight to leave the cache, and medians are compared. A peer
runs in a process of its own with the same shapes and copies; its rate counts the bytes of its own packed weight. With `--turns`
everything is measured so often, ours and then each peer, and medians of the turns are kept: load then falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

CACHE_BYTES = 96e6  # copies of a weight together exceed this
SHAPES = ((4096, 4096), (11008, 4096))
SCHEMES = (
    ("int", 4),
    ("nf", 4),
    ("kmeans", 4),
    ("kmeans:row", 4),
    ("int", 3),
    ("nf", 3),
    ("int", 2),
    ("int", 8),
)
PEERS = {
    "torch": [], "torchao": ["torchao"], "bitsandbytes": ["bitsandbytes"], "optimum-quanto": ["optimum-quanto"],
    "gptqmodel": ["gptqmodel"], "llama-cpp-python": ["llama-cpp-python"],
}  # fmt: skip


def in_turns(calls: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the kinds taking turns over their copies; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, copies in calls.items():
            for call in copies:
                start = time.perf_counter()
                call()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def rate(seconds: list[float], count: float, quantile: float = 0.5) -> float:
    """GB/s at a quantile of the times."""
    return count / sorted(seconds)[int(len(seconds) * quantile)] / 1e9


def measure_own(
    rows: int, columns: int, dtype: str, bits: int, axis: str, rounds: int, batch: int
) -> dict[str, Any]:
    """Our kernel on both paths beside a plain read of the same bytes and torch's bf16 product."""
    import torch

    from fracbit.kernels import PackedLinear
    from fracbit.kernels.cpu import NATIVE
    from fracbit.numerics import PackedTensor, quantize_tensor, stored_bits
    from fracbit.records.scheme import Scheme

    threads = torch.get_num_threads()
    scheme = Scheme(dtype, bits, 64, axis)
    first = quantize_tensor(torch.randn(rows, columns) * 0.02, scheme)
    size = stored_bits(first) / 8
    copies = max(2, int(CACHE_BYTES // size))
    weights = [first] + [
        PackedTensor(scheme, first.shape, first.codes.clone(), first.scales.clone(), None, first.table)
        for _ in range(copies - 1)
    ]
    x = torch.randn(batch, columns)
    raw = [torch.zeros(int(size), dtype=torch.uint8).random_() for _ in range(copies)]
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(2)]
    calls: dict[str, list[Callable[[], object]]] = {
        "read": [lambda r=r: NATIVE.read(r, threads) for r in raw]
    }
    for path in ("int8", "float"):
        calls[path] = [partial(PackedLinear(w, path), x) for w in weights]
    half = x.bfloat16()
    calls["torch bf16"] = [lambda w=w: torch.nn.functional.linear(half, w) for w in dense]
    seconds = in_turns(calls, rounds)
    read = {quantile: rate(seconds["read"], size, quantile) for quantile in (0.5, 0.1)}
    result: dict[str, Any] = {
        "rows": rows, "columns": columns, "scheme": f"{dtype}{bits}/64 {axis}", "batch": batch,
        "threads": threads, "bytes": size, "read_GBps": read[0.5],
        "bf16_us": statistics.median(seconds["torch bf16"]) * 1e6,
    }  # fmt: skip
    for path in ("int8", "float"):
        median, best = rate(seconds[path], size), rate(seconds[path], size, 0.1)
        result |= {
            f"{path}_us": statistics.median(seconds[path]) * 1e6, f"{path}_GBps": median,
            f"{path}_fraction": median / read[0.5], f"{path}_fraction_best": best / read[0.1],
        }  # fmt: skip
    return result


def own(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All schemes and shapes, printed as they come."""
    results = []
    print(
        f"{'shape':>12} {'scheme':>18} {'read GB/s':>9} | int8: us  GB/s  fraction (best) |"
        " float: us  GB/s  fraction (best) | bf16 us"
    )
    for rows, columns in arguments.shapes:
        for dtype, bits in arguments.schemes:
            for axis in ("in", "out") if bits == 4 and dtype in ("int", "nf") else ("in",):
                r = measure_own(rows, columns, dtype, bits, axis, arguments.rounds, arguments.batch)
                results.append(r)
                paths = " | ".join(
                    f"{r[p + '_us']:7.0f} {r[p + '_GBps']:5.1f} {r[p + '_fraction']:.2f} ({r[p + '_fraction_best']:.2f})"
                    for p in ("int8", "float")
                )
                print(
                    f"{rows:>6}x{columns:<5} {r['scheme']:>18} {r['read_GBps']:9.1f} | {paths} | {r['bf16_us']:.0f}",
                    flush=True,
                )
    return results


def peer(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Install a peer into its own environment (kept under --environments) and run peers.py there."""
    folder = arguments.environments / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            f"torch=={version('torch').split('+')[0]}",
            "numpy",
            *PEERS[name],
        ]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: does not install here: {done.stderr.strip().splitlines()[-1:]}")
            return []
    script = Path(__file__).with_name("peers.py")
    shapes = [f"{rows}x{columns}" for rows, columns in arguments.shapes]
    command = [str(python), str(script), name, str(arguments.rounds), str(arguments.batch), *shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: did not run: {done.stderr.strip().splitlines()[-1:]}")
        return []
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for r in results:
        print(
            f"{r['rows']:>6}x{r['columns']:<5} {r['name']:>28} {r['us']:8.0f} us {r['GBps']:6.1f} GB/s of packed bytes"
        )
    return results


def medians(turns: list[list[dict[str, Any]]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for all rows that agree in `names`: the median of every number."""
    same: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in (row for turn in turns for row in turn):
        same.setdefault(tuple(row[name] for name in names), []).append(row)
    return [
        {
            key: rows[0][key] if isinstance(rows[0][key], str) else statistics.median(r[key] for r in rows)
            for key in rows[0]
        }
        for rows in same.values()
    ]


def main() -> None:
    """Parse, measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split("x"))), default=SHAPES)
    schemes = {f"{dtype}{bits}": (dtype, bits) for dtype, bits in SCHEMES}
    parser.add_argument("--schemes", nargs="+", choices=list(schemes), default=list(schemes))
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "fracbit" / "bench")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.schemes = [schemes[name] for name in arguments.schemes]
    result: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
    }
    turns = [
        (own(arguments), [r for name in arguments.peers for r in peer(name, arguments)])
        for _ in range(arguments.turns)
    ]
    result["turns"] = arguments.turns
    result["own"] = medians([ours for ours, _ in turns], ("rows", "columns", "scheme"))
    result["peers"] = medians([theirs for _, theirs in turns], ("rows", "columns", "name"))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
