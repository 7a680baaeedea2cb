"""What a sweep would cost, before it starts: runs left, time and disk.

Time comes from measured rows that were judged as the grid's will be, on the same text and tasks: those of the same model, else
those of other models scaled by parameters (a run is little more than its evaluation, which grows with them), else one run of
the smallest model, measured for the purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from safetensors import SafetensorError, safe_open

from fracbit.bundled import bundled_model
from fracbit.records.row import Row, Run
from fracbit.sweeps.spec import Expansion

ROW_BYTES = 6_000  # a row and its index entries, without windows
WINDOW_BYTES = 16  # loss and token count of a window, as JSON


@dataclass(frozen=True)
class ModelPlan:
    """One model's part. `seconds` for what is left, None when nothing is known of the model's size; `basis` says from what."""

    model: str
    runs: int
    done: int
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Estimate:
    """What is left of a grid. `skipped`: points that are no runs, by reason; `disk_bytes` that the new rows will take."""

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


def estimate(
    expansion: Expansion,
    rows: Sequence[Row],
    parameters: Mapping[str, int | None],
    probe: tuple[int, float] | None = None,
) -> Estimate:
    """What is left of a grid on one worker, given the rows of its store.

    `parameters`: of each model, None where unknown; `probe`: parameters and seconds of a run measured for the purpose.
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
        plans.append(ModelPlan(model, runs[model], done[model], seconds, basis))
    windows = max((len(row.window_nll) for row in rows), default=64)
    missing = sum(runs.values()) - sum(done.values())
    return Estimate(tuple(plans), expansion.skipped, missing * (ROW_BYTES + WINDOW_BYTES * windows))


def measured_alike(expansion: Expansion, rows: Sequence[Row]) -> list[Row]:
    """The rows that tell how long the grid's runs will take: done, and judged on the same text and tasks."""
    wanted = {run.evaluation for run in expansion.runs.values()}
    return [row for row in rows if row.status == "done" and row.seconds > 0 and row.run.evaluation in wanted]


def parameters_of(model: str, root: Path) -> int | None:
    """Parameters of a local or the bundled checkpoint, from its headers; None for hub ids and unreadable folders."""
    folder = bundled_model() if model == "bundled" else root / model
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
    model: str, rows: Sequence[Row], size: int | None, probe: tuple[int, float] | None
) -> tuple[float | None, str]:
    own = [row.seconds for row in rows if row.run.recipe.model == model]
    if own:
        return median(own), f"median of {len(own)} stored runs"
    if size and rows:
        rate = median(row.seconds / row.parameters for row in rows)
        return rate * size, f"{len(rows)} runs of other models, by parameters"
    if size and probe:
        return probe[1] * size / probe[0], "one run measured now, by parameters"
    return None, "unknown: not a local checkpoint, and none of its runs is stored"


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
