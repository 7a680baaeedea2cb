"""Runs per minute of a sweep against the plain loop: a new process that loads, quantizes and evaluates, once per run.

    python bench/sweep/rate.py [--models tales-s tales-m] [--plain 6] [--out bench/results/rate.json]

Both do the same runs of one grid and must find the same losses. The plain loop is measured on every n-th run, spread over the
grid, since its runs do not depend on each other. CPU seconds are printed beside wall clock: on a machine that others use too,
they are the fairer figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(os.environ.get("FRACBIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GRID = """
root = {root}
models = {models}
[evaluation]
text = "data/tales-evaluation.u16?length=512&first=60&keep=256"
window = 256
[[arm]]
dtypes = ["int", "float", "nf", "dynamic", "power:1/2", "quantile"]
bits = [3, 4, 5, 6]
blocks = [64, 128]
"""


def plain(run_json: str) -> float:
    """One run as anyone would write it: nothing shared, nothing kept."""
    import torch
    from transformers import AutoModelForCausalLM

    from fracbit.data import read_documents
    from fracbit.evaluate import perplexity
    from fracbit.models.blocks import blocks, linears, weight_of
    from fracbit.models.find import family_of
    from fracbit.models.install import set_weight
    from fracbit.numerics import decode, quantize_tensor
    from fracbit.records.row import Run

    run = Run.model_validate_json(run_json)
    model = AutoModelForCausalLM.from_pretrained(SHARED / run.recipe.model, dtype=torch.float32)
    if run.quantized:
        family = family_of(model)
        for _, block in blocks(model, family):
            for linear in linears(block, family).values():
                set_weight(linear, decode(quantize_tensor(weight_of(linear), run.recipe.scheme)))
    documents = read_documents(str(SHARED / run.evaluation.text), None, model.config.vocab_size).documents
    return perplexity(model, documents, window=run.evaluation.window).nll


def cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tales-xs", "tales-s", "tales-m", "tales-l"])
    parser.add_argument("--plain", type=int, default=8, help="runs of the plain loop, spread over the grid")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no models at {SHARED}: set FRACBIT_SHARED")
    from fracbit.sweep.grid import expand, read_grid

    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        models = json.dumps([f"models/{name}" for name in arguments.models])
        grid.write_text(GRID.format(root=json.dumps(str(SHARED)), models=models))
        runs = expand(read_grid(grid)).runs
        swept = sweep_all(grid, Path(folder) / "s.db", len(runs))
        chosen = list(runs.values())[:: max(1, len(runs) // arguments.plain)][: arguments.plain]
        looped = loop([run.model_dump_json() for run in chosen])
    for key, run in runs.items():
        if run in chosen:
            found, expected = swept["nll"][key], looped["nll"][chosen.index(run)]
            assert abs(found - expected) < 1e-5, (str(run), found, expected)
    for name, one in (("sweep", swept), ("plain loop", looped)):
        print(f"{name:10}  {one['runs']:4} runs  {60 * one['runs'] / one['wall']:8.1f} runs a minute  "
              f"{one['wall'] / one['runs']:7.2f} s and {one['cpu'] / one['runs']:6.2f} CPU s a run")  # fmt: skip
    wall = looped["wall"] / looped["runs"] * swept["runs"] / swept["wall"]
    cpu = looped["cpu"] / looped["runs"] * swept["runs"] / swept["cpu"]
    print(
        f"the sweep does {wall:.1f} times as many runs a minute ({cpu:.1f} times by CPU time); losses agree"
    )
    if arguments.out:
        parts = {name: {key: part[key] for key in ("runs", "wall", "cpu")}
                 for name, part in (("sweep", swept), ("plain", looped))}  # fmt: skip
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        found = {
            "models": arguments.models,
            **parts,
            "times_by_clock": wall,
            "times_by_cpu": cpu,
            "machine": machine,
        }
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def sweep_all(grid: Path, store: Path, count: int) -> dict:
    """The whole command, its start included, in a process of its own."""
    from fracbit.sweep.store import open_store

    started, cpu = time.perf_counter(), cpu_seconds()
    main = [sys.executable, "-c", "import fracbit.cli as cli; cli.main()"]
    subprocess.run(
        [*main, "sweep", str(grid), "--store", str(store), "--json"], check=True, stdout=subprocess.DEVNULL
    )
    wall, used = time.perf_counter() - started, cpu_seconds() - cpu
    with open_store(str(store)) as opened:
        rows = opened.rows()
    assert len(rows) == count
    return {"runs": count, "wall": wall, "cpu": used, "nll": {row.key: row.nll for row in rows}}


def loop(runs: list[str]) -> dict:
    """A process a run."""
    started, cpu = time.perf_counter(), cpu_seconds()
    found = []
    for run in runs:
        result = subprocess.run(
            [sys.executable, __file__, "--one"], input=run, check=True, text=True, stdout=subprocess.PIPE
        )
        found.append(float(result.stdout.split()[-1]))
    return {
        "runs": len(runs),
        "wall": time.perf_counter() - started,
        "cpu": cpu_seconds() - cpu,
        "nll": found,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(plain(sys.stdin.read()))
    else:
        main()
