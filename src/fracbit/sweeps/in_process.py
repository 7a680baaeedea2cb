"""The engine with nothing to start: runs one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fracbit.records.row import Row, Run
from fracbit.sweeps.queue import Queue, Workload
from fracbit.sweeps.runner import failed_row
from fracbit.sweeps.workbench import RUN_FAILURES, Workbench, explain


@dataclass(frozen=True)
class InProcess:
    """The engine with nothing to start: runs one after the other, here. `root`: where relative paths of the grid start."""

    root: Path
    device: str = "cpu"

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
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
