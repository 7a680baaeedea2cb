"""Runs per minute of a sweep against the plain loop: a new process that loads, quantizes and evaluates, once per run.

    python bench/sweep/rate.py [--models tales-s tales-m] [--plain 6] [--out bench/results/rate.json]

Both do the same runs of one grid a model, one after the other with the same number of threads, and must find the same losses.
The plain loop is measured on every n-th run, spread over the grid, since its runs do not depend on each other. CPU seconds are
printed beside wall clock: on a machine that others use too, they are the fairer figure. Beside both stands what no run can go
below: a bare perplexity of the loaded model.
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
    from fracbit.evaluation import perplexity
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


def bare(run_json: str, passes: int = 5) -> dict:
    """The evaluation alone, of a model that is loaded and stays as it is: the fastest of some passes."""
    import torch
    from transformers import AutoModelForCausalLM

    from fracbit.data import read_documents
    from fracbit.evaluation import perplexity
    from fracbit.records.row import Run

    run = Run.model_validate_json(run_json)
    model = AutoModelForCausalLM.from_pretrained(SHARED / run.recipe.model, dtype=torch.float32)
    documents = read_documents(str(SHARED / run.evaluation.text), None, model.config.vocab_size).documents
    taken = []
    for _ in range(passes):
        started, cpu = time.perf_counter(), cpu_seconds()
        perplexity(model, documents, window=run.evaluation.window)
        taken.append((time.perf_counter() - started, cpu_seconds() - cpu))
    walls, cpus = zip(*taken, strict=True)
    return {"runs": 1, "wall": min(walls), "cpu": min(cpus)}


def cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure both and print the ratios, model by model and for all together."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tales-xs", "tales-s", "tales-m", "tales-l"])
    parser.add_argument(
        "--plain", type=int, default=3, help="runs of the plain loop a model, spread over its grid"
    )
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no models at {SHARED}: set FRACBIT_SHARED")
    found = {model: measure(model, arguments.plain) for model in arguments.models}
    found["all"] = together(list(found.values()))
    for model, parts in found.items():
        for name, one in parts.items():
            print(f"{model:9} {name:10} {one['runs']:4.0f} runs  {60 * one['runs'] / one['wall']:8.1f} runs a minute  "
                  f"{one['wall'] / one['runs']:6.2f} s and {one['cpu'] / one['runs']:6.2f} CPU s a run")  # fmt: skip
        share = {key: each(parts["bare"], key) / each(parts["sweep"], key) for key in ("wall", "cpu")}
        print(
            f"{model:9} {share['wall']:.0%} of a sweep's run is its bare evaluation ({share['cpu']:.0%} of its CPU time)"
        )
        print(
            f"{model:9} the sweep does {times(parts, 'wall'):.1f} times as many ({times(parts, 'cpu'):.1f} by CPU time)"
        )
    if arguments.out:
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        figures = {model: {**parts, "times_by_clock": times(parts, "wall"), "times_by_cpu": times(parts, "cpu")}
                   for model, parts in found.items()}  # fmt: skip
        arguments.out.write_text(json.dumps({**figures, "machine": machine}, indent=1) + "\n")


def measure(model: str, plain: int) -> dict:
    """Both on one model's grid; their losses must agree."""
    from fracbit.sweeps.spec import expand, read_grid

    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        grid.write_text(GRID.format(root=json.dumps(str(SHARED)), models=json.dumps(f"models/{model}")))
        runs = expand(read_grid(grid)).runs
        swept, losses = sweep_all(grid, Path(folder) / "s.db", len(runs))
    chosen = dict(list(runs.items())[:: max(1, len(runs) // plain)][:plain])
    looped, expected = loop([run.model_dump_json() for run in chosen.values()])
    for (key, run), nll in zip(chosen.items(), expected, strict=True):
        assert abs(losses[key] - nll) < 1e-5, (str(run), losses[key], nll)
    one = next(iter(chosen.values())).model_dump_json()
    return {"sweep": swept, "plain loop": looped, "bare": json.loads(child("--bare", one))}


def child(task: str, run: str) -> str:
    """What this file prints about a run in a new process."""
    command = [sys.executable, __file__, task]
    return subprocess.run(command, input=run, check=True, text=True, stdout=subprocess.PIPE).stdout


def together(models: list[dict]) -> dict:
    """The same number of runs of every model: seconds a run are averaged."""
    return {
        name: {"runs": len(models)} | {key: sum(part[name][key] / part[name]["runs"] for part in models)
                                       for key in ("wall", "cpu")}
        for name in ("sweep", "plain loop", "bare")
    }  # fmt: skip


def times(parts: dict, key: str) -> float:
    """How many runs the sweep does while the plain loop does one."""
    return each(parts["plain loop"], key) / each(parts["sweep"], key)


def each(part: dict, key: str) -> float:
    """Seconds a run."""
    return part[key] / part["runs"]


def sweep_all(grid: Path, store: Path, count: int) -> tuple[dict, dict]:
    """The whole command, its start included, in a process of its own."""
    from fracbit.sweeps.store import open_store

    started, cpu = time.perf_counter(), cpu_seconds()
    main = [sys.executable, "-c", "import fracbit.cli as cli; cli.main()"]
    subprocess.run(
        [*main, "sweep", str(grid), "--store", str(store), "--json"], check=True, stdout=subprocess.DEVNULL
    )
    wall, used = time.perf_counter() - started, cpu_seconds() - cpu
    with open_store(str(store)) as opened:
        rows = opened.rows()
    assert len(rows) == count
    return {"runs": count, "wall": wall, "cpu": used}, {row.key: row.nll for row in rows}


def loop(runs: list[str]) -> tuple[dict, list[float]]:
    """A process a run."""
    started, cpu = time.perf_counter(), cpu_seconds()
    found = [float(child("--one", run).split()[-1]) for run in runs]
    return {"runs": len(runs), "wall": time.perf_counter() - started, "cpu": cpu_seconds() - cpu}, found


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(plain(sys.stdin.read()))
    elif sys.argv[1:] == ["--bare"]:
        print(json.dumps(bare(sys.stdin.read())))
    else:
        main()
