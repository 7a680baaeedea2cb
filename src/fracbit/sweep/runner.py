"""`run_sweep`: measure what a store lacks, one claim at a time, with an engine of choice; and the engine of this process.

The driver owns the store: engines hand rows to it, it writes each as it comes. So whatever dies, driver or worker, loses the
runs in flight and nothing else, and what was stored is never measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fracbit.errors import FracbitError
from fracbit.records.row import Row, Run, run_key
from fracbit.sweep.grid import Expansion
from fracbit.sweep.schedule import Queue
from fracbit.sweep.store import Store
from fracbit.sweep.workbench import RUN_FAILURES, Source, Workbench, explain, source_of

POLL = 1.0
Progress = Callable[[Row, int, int], None]
"""Called after every row with it, the number of rows that are there and of runs in all."""


@dataclass(frozen=True)
class Job:
    """A run that waits, with the source it needs."""

    source: Source
    run: Run


class Engine(Protocol):
    """Does the runs of a queue. One method."""

    def measure(self, queue: Queue[Source], runs: dict[str, Run], claim: Callable[[str], bool]) -> Iterator[Row]:
        """Take runs from the queue, claim each just before it starts, and yield rows as they are done."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a sweep did. `measured`: rows it wrote; `failed`: all failed rows of the grid; `seconds`: wall clock."""

    total: int
    measured: int
    failed: tuple[Row, ...]
    seconds: float


@dataclass(frozen=True)
class InProcess:
    """The engine with nothing to start: runs one after the other, here. `root`: where relative paths of the grid start."""

    root: Path
    device: str = "cpu"

    def measure(self, queue: Queue[Source], runs: dict[str, Run], claim: Callable[[str], bool]) -> Iterator[Row]:
        """See `Engine.measure`."""
        bench: Workbench | None = None
        while (taken := queue.take(0)) is not None:
            source, key = taken
            if not claim(key):
                continue
            if bench is None or bench.source != source:
                bench = None  # free the old model before the next is loaded
                try:
                    bench = Workbench(source, self.root, self.device)
                except RUN_FAILURES as error:
                    yield failed_row(runs[key], explain(error))
                    yield from (failed_row(runs[k], explain(error)) for k in queue.drop(source) if claim(k))
                    continue
            yield bench.measure(runs[key])


def run_sweep(
    store: Store, expansion: Expansion, engine: Engine, progress: Progress | None = None, retry_failed: bool = False
) -> Outcome:
    """Measure every run of a grid that the store lacks; returns when all are there, whoever measured them.

    `retry_failed` tries failed runs again. Raises `OutputError` when the store cannot be written any more.
    """
    started = time.perf_counter()
    runs = dict(expansion.runs)
    if retry_failed:
        store.forget_failed(runs)
    store.join()
    measured = 0
    while missing := {key: run for key, run in runs.items() if key not in store.keys()}:
        store.recover()
        queue = Queue([(source_of(run), key) for key, run in missing.items()])
        before = measured
        for row in engine.measure(queue, missing, store.claim):
            measured += store.write(row)
            if progress is not None:
                progress(row, len(runs) - len(missing) + measured - before, len(runs))
        if measured == before:
            time.sleep(POLL)  # another sweep is at what is left
    failed = tuple(row for row in store.rows("failed") if row.key in runs)
    return Outcome(len(runs), measured, failed, time.perf_counter() - started)


def failed_row(run: Run, error: str) -> Row:
    """The row of a run that could not even start."""
    return Row(key=run_key(run), run=run, status="failed", error=error)


def check_complete(outcome: Outcome) -> str:
    """The closing list of failed runs, "" when there are none."""
    if not outcome.failed:
        return ""
    lines = [f"  {row.run}: {row.error}" for row in outcome.failed]
    return "\n".join([f"{len(outcome.failed)} of {outcome.total} runs failed:", *lines])


__all__ = ["Engine", "FracbitError", "InProcess", "Outcome", "Progress", "check_complete", "failed_row", "run_sweep"]
