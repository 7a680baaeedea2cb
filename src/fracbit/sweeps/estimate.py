"""The cost of a sweep, before it starts: runs left, time and disk.

The time is estimated from measured rows with the same text and tasks. Rows of the same model come first, then rows of
other models, scaled by parameters: most of a run is its evaluation, which grows with them. Without such rows, one run
of the smallest model is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from safetensors import SafetensorError, safe_open

from fracbit.bundled import BUNDLED, bundled_model
from fracbit.records.files import is_store
from fracbit.records.row import Row, Run
from fracbit.sweeps.queue import workload_of
from fracbit.sweeps.spec import Expansion

ROW_BYTES = 6_000  # a row and its index entries, without windows
WINDOW_BYTES = 16  # loss and token count of a window, as JSON


@dataclass(frozen=True)
class ModelPlan:
    """One model's part. `seconds`: time of the runs left, None if unknown; `basis`: the source of the estimate."""

    model: str
    runs: int
    done: int
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Estimate:
    """What is left of a grid. `skipped`: points that are not runs, by reason; `disk_bytes`: size of the new rows."""

    models: tuple[ModelPlan, ...]
    skipped: Mapping[str, int]
    disk_bytes: int

    @property
    def runs(self) -> int:
        """Runs of the sweep."""
        return sum(model.runs for model in self.models)

    @property
    def done(self) -> int:
        """Runs that are stored already."""
        return sum(model.done for model in self.models)

    @property
    def seconds(self) -> float | None:
        """Of all models one after the other; None when a part is unknown."""
        parts = [model.seconds for model in self.models]
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass(frozen=True)
class Probe:
    """A run that was measured for an estimate: its parameters and seconds; `error`: why it failed, "" when it did not."""

    parameters: int = 0
    seconds: float = 0.0
    error: str = ""


def estimate_sweep(
    expansion: Expansion, store: str, root: Path, device: str = "cpu", known: Iterable[Row] = ()
) -> Estimate:
    """What is left of a sweep, given its store, which need not exist. `known`: rows that it would take over first.

    Measures one run of the smallest model on `device` when no row says how long runs take.
    """
    rows = list({row.key: row for row in (*known, *_stored(store))}.values())
    parameters = {model: parameters_of(model, root) for model in expansion.models}
    run = None if measured_alike(expansion, rows) else cheapest(expansion, parameters)
    return estimate(expansion, rows, parameters, None if run is None else _probe(run, root, device))


def _stored(store: str) -> list[Row]:
    """The rows of a store; none when it does not exist."""
    if not is_store(store):
        return []
    from fracbit.sweeps.store import open_store

    with open_store(store) as opened:
        return opened.rows()


def _probe(run: Run, root: Path, device: str) -> Probe:
    """Measure a run for an estimate."""
    from fracbit.sweeps.workbench import Failure, open_bench

    bench = open_bench(workload_of(run), root, device, keep_going=False)
    row = bench.row(run) if isinstance(bench, Failure) else bench.measure(run)
    return Probe(row.parameters, row.seconds, row.error or "")


def estimate(
    expansion: Expansion,
    rows: Sequence[Row],
    parameters: Mapping[str, int | None],
    probe: Probe | None = None,
) -> Estimate:
    """What is left of a grid on one worker, given the rows of its store.

    `parameters`: of each model, None where unknown; `probe`: a run that was measured for the estimate.
    """
    stored = {row.key for row in rows}
    runs = Counter(run.recipe.model for run in expansion.runs.values())
    done = Counter(run.recipe.model for key, run in expansion.runs.items() if key in stored)
    plans = []
    alike = measured_alike(expansion, rows)
    for model in expansion.models:
        each, basis = _seconds_per_run(model, alike, parameters.get(model), probe)
        left = runs[model] - done[model]
        seconds = 0.0 if left == 0 else None if each is None else each * left
        plans.append(ModelPlan(model, runs[model], done=done[model], seconds=seconds, basis=basis))
    windows = max((len(row.window_nll) for row in rows), default=64)
    missing = sum(runs.values()) - sum(done.values())
    return Estimate(tuple(plans), expansion.skipped, missing * (ROW_BYTES + WINDOW_BYTES * windows))


def measured_alike(expansion: Expansion, rows: Sequence[Row]) -> list[Row]:
    """The rows that the time is estimated from: done, and evaluated on the same text and tasks."""
    wanted = {run.evaluation for run in expansion.runs.values()}
    return [row for row in rows if row.status == "done" and row.seconds > 0 and row.run.evaluation in wanted]


def parameters_of(model: str, root: Path) -> int | None:
    """Parameters of a local or the bundled checkpoint, from its headers; None for hub ids and unreadable folders."""
    folder = root / model
    if model == BUNDLED and not folder.is_dir():
        folder = bundled_model()
    total = 0
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as tensors:
                total += sum(_size(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return total or None


def cheapest(expansion: Expansion, parameters: Mapping[str, int | None]) -> Run | None:
    """A quantized run of the smallest model whose size is known: what to measure for a probe."""
    known = {model: size for model, size in parameters.items() if size}
    runs = [run for run in expansion.runs.values() if run.quantized and run.recipe.model in known]
    return min(runs, key=lambda run: known[run.recipe.model], default=None)


def _seconds_per_run(
    model: str, rows: Sequence[Row], size: int | None, probe: Probe | None
) -> tuple[float | None, str]:
    own = [row.seconds for row in rows if row.run.recipe.model == model]
    if own:
        return median(own), f"median of {len(own)} stored runs"
    if size and rows:
        rate = median(row.seconds / row.parameters for row in rows)
        return rate * size, f"{len(rows)} runs of other models, by parameters"
    if size and probe and probe.error:
        return None, f"unknown: the run measured for the estimate failed: {probe.error}"
    if size and probe:
        return probe.seconds * size / probe.parameters, "one run measured now, by parameters"
    return None, "unknown: not a local checkpoint, and none of its runs is stored"


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
