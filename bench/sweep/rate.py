"""Runs per minute of a sweep against the plain loop: a new process that loads, quantizes and evaluates, once per run.
Makes the table of CPU seconds a run in docs/scaling.md (bench/results/rate.json).

    python bench/sweep/rate.py [--arms data-free float-chain quantized-chain] [--models tales-s tales-m] [--plain 6]
        [--json bench/results/rate.json]

There are three kinds of runs (`--arms`): rounding without data, and gptq calibrated on the float or on the quantized chain.
Both do the same runs of one grid a model, one after the other with the same number of threads, and must find the same losses.
The plain loop is measured on every n-th quantized run, spread over the grid, since its runs do not depend on each other. CPU
seconds are printed beside wall clock: on a machine that others use too, they are the fairer figure. Beside both stands what no
run can go below: a bare perplexity of the loaded model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import DATA_FREE, SHARED, STORIES, Ran, Row, arguments, fracbit, run, say_machine, write_json

from fracbit.records.row import Run
from fracbit.sweeps.spec import expand, read_sweep
from fracbit.sweeps.store import open_store

CALIBRATED = """
bits = [3, 4]
blocks = [32, 64, 128, 256]
offsets = ["zero"]
quantizers = ["gptq"]
search = [false, true]
"""
ARMS = {
    "data-free": DATA_FREE,
    "float-chain": CALIBRATED + 'chains = "float"',
    "quantized-chain": CALIBRATED + 'chains = "quantized"',
}


def child(task: str, one: Run) -> tuple[str, Ran]:
    """What plain.py prints about a run in a new process."""
    ran = run([sys.executable, Path(__file__).with_name("plain.py"), task], given=one.model_dump_json())
    if ran.status:
        raise SystemExit(f"{task} {one} failed")
    return ran.printed.splitlines()[-1], ran


def part(ran: Iterable[Ran], runs: int) -> Row:
    """Seconds of some processes that did so many runs together."""
    walls, cpus = zip(*((each.seconds, each.cpu_seconds) for each in ran), strict=True)
    return {"runs": runs, "wall": sum(walls), "cpu": sum(cpus)}


def measure(arm: str, model: str, plain_runs: int) -> dict[str, Row]:
    """Both on one model's grid of an arm, the sweep as a whole command; their losses must agree."""
    with tempfile.TemporaryDirectory() as folder:
        grid, store = Path(folder) / "grid.toml", str(Path(folder) / "s.db")
        head = STORIES.format(root=json.dumps(str(SHARED)), models=json.dumps(f"models/{model}"))
        grid.write_text(head + ARMS[arm])
        runs = expand(read_sweep(grid)).runs
        _, swept = fracbit("sweep", grid, "--store", store)
        with open_store(store) as opened:
            losses = {row.key: row.nll for row in opened.rows()}
    assert len(losses) == len(runs)
    quantized = [(key, one) for key, one in runs.items() if one.quantized]
    chosen = dict(quantized[:: max(1, len(quantized) // plain_runs)][:plain_runs])
    looped = {key: child("one", one) for key, one in chosen.items()}
    for key, (nll, _) in looped.items():
        assert abs(losses[key] - float(nll)) < 1e-5, (str(chosen[key]), losses[key], nll)
    lower, _ = child("bare", next(iter(chosen.values())))
    loop = part((ran for _, ran in looped.values()), len(looped))
    return {"sweep": part([swept], len(runs)), "plain loop": loop, "bare": json.loads(lower)}


def together(models: list[dict[str, Row]], name: str) -> Row:
    """The same number of runs of every model: seconds a run are averaged."""
    seconds = {key: sum(each(parts[name], key) for parts in models) for key in ("wall", "cpu")}
    return {"runs": len(models), **seconds}


def times(parts: dict[str, Row], key: str) -> float:
    """How many runs the sweep does while the plain loop does one."""
    return each(parts["plain loop"], key) / each(parts["sweep"], key)


def each(one: Row, key: str) -> float:
    """Seconds a run."""
    return float(one[key] / one["runs"])


def show(model: str, parts: dict[str, Row]) -> None:
    for name, one in parts.items():
        print(f"{model:9} {name:10} {one['runs']:4.0f} runs  {60 / each(one, 'wall'):8.1f} runs a minute  "
              f"{each(one, 'wall'):6.2f} s and {each(one, 'cpu'):6.2f} CPU s a run")  # fmt: skip
    share = {key: each(parts["bare"], key) / each(parts["sweep"], key) for key in ("wall", "cpu")}
    print(f"{model:9} {share['wall']:.0%} of a sweep's run is its bare evaluation, {share['cpu']:.0%} by CPU")
    print(
        f"{model:9} the sweep does {times(parts, 'wall'):.1f} times as many, {times(parts, 'cpu'):.1f} by CPU"
    )


def rates(arm: str, models: list[str], plain_runs: int) -> dict[str, Row]:
    """The rates of an arm, by model and together; they are printed too."""
    print(f"## {arm}\n", flush=True)
    found: dict[str, Row] = {model: measure(arm, model, plain_runs) for model in models}
    found["all"] = {name: together(list(found.values()), name) for name in ("sweep", "plain loop", "bare")}
    for model, parts in found.items():
        show(model, parts)
    print()
    for parts in found.values():
        parts |= {"times_by_clock": times(parts, "wall"), "times_by_cpu": times(parts, "cpu")}
    return found


def main() -> None:
    parser = arguments(__doc__, models=["tales-xs", "tales-s", "tales-m", "tales-l"], json=None)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], help="kinds of runs")
    parser.add_argument("--plain", type=int, default=3, help="runs of the plain loop a model")
    given = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no models at {SHARED}: set FRACBIT_SHARED")
    say_machine()
    write_json(given.json, {arm: rates(arm, given.models, given.plain) for arm in given.arms})


if __name__ == "__main__":
    main()
