"""`run_sweep`: measure the runs that a store lacks, one claim at a time, with a given engine.

The driver owns the store: it writes each row as soon as the engine returns it. If the driver or a worker dies, only the
current runs are lost, and stored runs are never measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from fracbit.checkpoint.load import check_device
from fracbit.errors import RecipeError
from fracbit.records.progress import showing
from fracbit.records.row import Row, Run
from fracbit.sweeps.in_process import InProcess
from fracbit.sweeps.queue import Queue, Workload, workload_of
from fracbit.sweeps.spec import Sweep, expand, read_sweep
from fracbit.sweeps.store import Store, open_store
from fracbit.sweeps.trackers import Track, tracking

POLL = 1.0
OnRow = Callable[[Row, int, int], None]
"""Called after every row with the row, the number of stored rows and the number of all runs."""


class Engine(Protocol):
    """Measures the runs of a queue."""

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
        """Take runs from the queue, claim each just before it starts, and yield rows as they are done."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a sweep did. `measured`: rows it wrote; `failed`: all failed rows of the sweep; `seconds`: wall clock.

    `skipped`: points of the sweep file that are not runs, counted by reason.
    """

    total: int
    measured: int
    failed: tuple[Row, ...]
    seconds: float
    skipped: Mapping[str, int] = field(default_factory=dict)


def sweep(
    file: str | Path | Sweep,
    store: str | Path = "sweep.db",
    *,
    root: str | Path | None = None,
    engine: Engine | None = None,
    device: str = "cpu",
    retry_failed: bool = False,
    keep_going: bool = False,
    known: Iterable[Row] = (),
    trust_remote_code: bool = False,
    track: str | None = None,
    progress: OnRow | Literal["auto"] | None = "auto",
) -> Outcome:
    """Measure every run of a sweep (a TOML file or a `Sweep`) that the store lacks. Call it again to continue.

    - `store`: an SQLite file, or postgresql://USER@HOST/NAME. `root`: where relative paths of the sweep start; by default the
      folder of its file, or the current one.
    - `engine`: what measures; by default this process, one run after another. Without an engine, `device` is where models
      run (cpu, cuda, auto for all GPUs), and with `keep_going` a bug of fracbit becomes a failed row instead of ending the
      sweep; an engine has its own settings for both.
    - `retry_failed` tries failed runs again. `known`: rows that the store takes over first, such as those of another store
      (sweeps/parquet.py). `trust_remote_code`: run the models' own code, which a file cannot ask for. `track`: an experiment
      tracker that gets every new row, such as "mlflow:NAME" (sweeps/trackers.py). `progress` is called after every row; "auto"
      is a bar where the sweep runs.

    Raises `RecipeError` for a file that is not a sweep and for a device beside an engine, `SourceError` for a device that
    cannot be used here, `OutputError` when the store cannot be written.
    """
    read = file if isinstance(file, Sweep) else read_sweep(Path(file))
    read = read.model_copy(update={"trust_remote_code": True}) if trust_remote_code else read
    folder = Path.cwd() if isinstance(file, Sweep) else Path(file).parent
    expansion = expand(read)
    place = Path(root) if root is not None else (folder / read.root).resolve()
    used = _here(place, device, keep_going) if engine is None else engine
    if engine is not None and (device, keep_going) != ("cpu", False):
        raise RecipeError(
            "an engine has its own device and keep_going: give them to the engine, not to the sweep"
        )
    bar = showing("auto" if progress == "auto" else None)
    with tracking(track) as add, open_store(str(store)) as opened, bar as show:
        opened.add(known)
        on_row = None if show is None else lambda row, done, total: show(str(row.run), done, total)
        called = on_row if progress == "auto" else progress
        told = called if add is None else _both(add, called)
        outcome = run_sweep(opened, expansion.runs, engine=used, progress=told, retry_failed=retry_failed)
    return replace(outcome, skipped=expansion.skipped)


def _both(add: Track, called: OnRow | None) -> OnRow:
    """Add a row to a tracker, and call what is called after every row."""

    def tell(row: Row, done: int, total: int) -> None:
        add(row)
        if called is not None:
            called(row, done, total)

    return tell


def _here(root: Path, device: str, keep_going: bool) -> InProcess:
    """The engine of this process. Raises `SourceError` for a device that cannot be used, before any run fails by it."""
    if device != "auto":
        check_device(device)
    return InProcess(root, device, keep_going)


def run_sweep(
    store: Store,
    wanted: Mapping[str, Run],
    engine: Engine,
    progress: OnRow | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Measure the `wanted` runs that the store lacks; returns when all are stored, by this driver or another.

    `retry_failed` tries failed runs again. Raises `OutputError` when the store cannot be written any more.
    """
    started = time.perf_counter()
    runs = dict(wanted)
    if retry_failed:
        store.forget_failed(runs)
    store.join()
    measured = 0
    while missing := _missing(store, runs):
        store.recover()
        queue = Queue([(workload_of(run), key) for key, run in missing.items()])
        before = measured
        for row in engine.measure(queue, missing, store.claim):
            measured += store.write(row)
            if progress is not None:
                progress(row, len(runs) - len(missing) + measured - before, len(runs))
        if measured == before:
            time.sleep(POLL)  # another sweep is measuring the rest
    there = {row.key: row for row in store.rows("failed")}
    failed = tuple(there[key] for key in runs if key in there)  # in the order of the sweep
    return Outcome(len(runs), measured, failed, time.perf_counter() - started)


def _missing(store: Store, runs: Mapping[str, Run]) -> dict[str, Run]:
    there = store.keys()
    return {key: run for key, run in runs.items() if key not in there}


def check_complete(outcome: Outcome) -> str:
    """The final list of failed runs, grouped by reason; "" when there are none."""
    if not outcome.failed:
        return ""
    reasons: dict[str, list[str]] = {}
    for row in outcome.failed:
        reasons.setdefault(str(row.error), []).append(str(row.run))
    head = f"{len(outcome.failed)} of {outcome.total} runs failed; --retry-failed tries them again:"
    return "\n".join([head, *(f"  {error}\n    {', '.join(names)}" for error, names in reasons.items())])
