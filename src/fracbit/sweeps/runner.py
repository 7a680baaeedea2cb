"""`run_sweep`: measure what a store lacks, one claim at a time, with an engine of choice.

The driver owns the store: engines hand rows to it, it writes each as it comes. So whatever dies, driver or worker, loses the
runs in flight and nothing else, and what was stored is never measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fracbit.records.row import Row, Run, run_key
from fracbit.sweeps.queue import Queue, Workload, source_of
from fracbit.sweeps.store import Store

POLL = 1.0
Progress = Callable[[Row, int, int], None]
"""Called after every row with it, the number of rows that are there and of runs in all."""


class Engine(Protocol):
    """Does the runs of a queue. One method."""

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
        """Take runs from the queue, claim each just before it starts, and yield rows as they are done."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a sweep did. `measured`: rows it wrote; `failed`: all failed rows of the grid; `seconds`: wall clock."""

    total: int
    measured: int
    failed: tuple[Row, ...]
    seconds: float


def run_sweep(
    store: Store,
    wanted: Mapping[str, Run],
    engine: Engine,
    progress: Progress | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Measure every one of the `wanted` runs that the store lacks; returns when all are there, whoever measured them.

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
        queue = Queue([(source_of(run), key) for key, run in missing.items()])
        before = measured
        for row in engine.measure(queue, missing, store.claim):
            measured += store.write(row)
            if progress is not None:
                progress(row, len(runs) - len(missing) + measured - before, len(runs))
        if measured == before:
            time.sleep(POLL)  # another sweep is at what is left
    there = {row.key: row for row in store.rows("failed")}
    failed = tuple(there[key] for key in runs if key in there)  # in the order of the grid
    return Outcome(len(runs), measured, failed, time.perf_counter() - started)


def _missing(store: Store, runs: Mapping[str, Run]) -> dict[str, Run]:
    there = store.keys()
    return {key: run for key, run in runs.items() if key not in there}


def failed_row(run: Run, error: str) -> Row:
    """The row of a run that could not even start."""
    return Row(key=run_key(run), run=run, status="failed", error=error)


def check_complete(outcome: Outcome) -> str:
    """The closing list of failed runs, those of one reason together; "" when there are none."""
    if not outcome.failed:
        return ""
    reasons: dict[str, list[str]] = {}
    for row in outcome.failed:
        reasons.setdefault(str(row.error), []).append(str(row.run))
    head = f"{len(outcome.failed)} of {outcome.total} runs failed; --retry-failed tries them again:"
    return "\n".join([head, *(f"  {error}\n    {', '.join(names)}" for error, names in reasons.items())])
