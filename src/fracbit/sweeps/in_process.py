"""The engine of this process: it measures one run after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fracbit.records.row import Row, Run
from fracbit.sweeps.queue import Queue, Workload
from fracbit.sweeps.workbench import Failure, Workbench, open_bench


@dataclass(frozen=True)
class InProcess:
    """The engine of this process: one run after another. `root`: where relative paths of the sweep start.

    `keep_going`: a bug of fracbit becomes a failed row with its traceback; without it the sweep stops there.
    """

    root: Path
    device: str = "cpu"
    keep_going: bool = False

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
        """See `Engine.measure`."""
        bench: Workbench | Failure | None = None
        while (taken := queue.take(0)) is not None:
            workload, key = taken
            if not claim(key):
                continue
            if not isinstance(bench, Workbench) or bench.workload != workload:
                bench = None  # free the old model before the next is loaded
                bench = open_bench(workload, self.root, self.device, self.keep_going)
            if isinstance(bench, Failure):
                yield bench.row(runs[key])
                yield from (bench.row(runs[other]) for other in queue.drop(workload) if claim(other))
            else:
                yield bench.measure(runs[key], self.keep_going)
