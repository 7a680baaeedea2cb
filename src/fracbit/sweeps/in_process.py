"""The engine with nothing to start: runs one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fracbit.records.row import Row, Run, failed_row
from fracbit.sweeps.queue import Queue, Workload
from fracbit.sweeps.workbench import RUN_FAILURES, Workbench, explain


@dataclass(frozen=True)
class InProcess:
    """The engine with nothing to start: runs one after the other, here. `root`: where relative paths of the sweep start.

    `keep_going`: a bug of fracbit becomes a failed row with its traceback; without it the sweep stops there.
    """

    root: Path
    device: str = "cpu"
    keep_going: bool = False

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
        """See `Engine.measure`."""
        bench: Workbench | None = None
        while (taken := queue.take(0)) is not None:
            workload, key = taken
            if not claim(key):
                continue
            if bench is None or bench.workload != workload:
                bench = None  # free the old model before the next is loaded
                try:
                    bench = Workbench(workload, self.root, self.device)
                except RUN_FAILURES as error:
                    yield failed_row(runs[key], explain(error))
                    yield from (failed_row(runs[k], explain(error)) for k in queue.drop(workload) if claim(k))
                    continue
            yield bench.measure(runs[key], self.keep_going)
