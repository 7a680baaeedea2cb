"""The order of runs: a worker keeps its loaded model; an idle one takes the model with most waiting work per worker.

Loading a large model takes longer than many of its runs. So a worker changes models only when its own has no runs left.
It joins a model that other workers have loaded only if the work left per worker takes longer than loading. The same
queue drives the in-process engine (one worker), Ray, and the simulation of a cluster (bench/sweep/cluster.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fracbit.records.row import Evaluation, Run

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Workload:
    """What a workbench is made for. Runs of equal workloads share one."""

    model: str
    revision: str | None
    trust_remote_code: bool
    evaluation: Evaluation


def workload_of(run: Run) -> Workload:
    """The workload that a run belongs to."""
    recipe = run.recipe
    return Workload(recipe.model, recipe.revision, recipe.trust_remote_code, run.evaluation)


class Queue(Generic[S]):
    """Waiting runs, by the workload they need. It also knows the workload that each worker has loaded."""

    def __init__(
        self,
        items: Iterable[tuple[S, str]],
        run_seconds: Callable[[S], float] = lambda _: 1.0,
        load_seconds: Callable[[S], float] = lambda _: 0.0,
        fits: Callable[[int, S], bool] = lambda _, __: True,
    ) -> None:
        """`items`: (workload, key) in order; `run_seconds`, `load_seconds`: estimates; `fits(worker, workload)`."""
        self.waiting: dict[S, deque[str]] = {}
        for workload, key in items:
            self.waiting.setdefault(workload, deque()).append(key)
        self.loaded: dict[int, S] = {}
        self.run_seconds, self.load_seconds, self.fits = run_seconds, load_seconds, fits

    def __len__(self) -> int:
        """Runs that wait."""
        return sum(len(keys) for keys in self.waiting.values())

    def take(self, worker: int) -> tuple[S, str] | None:
        """The next run for a worker, whose workload then counts as loaded; None if no run is worth loading."""
        workload = self._choose(worker)
        if workload is None:
            return None
        self.loaded[worker] = workload
        return workload, self.waiting[workload].popleft()

    def give_back(self, workload: S, key: str) -> None:
        """Put back a run that was taken and not done (its worker died); it comes next."""
        self.waiting.setdefault(workload, deque()).appendleft(key)

    def leave(self, worker: int) -> None:
        """A worker is gone; what it had loaded no longer counts."""
        self.loaded.pop(worker, None)

    def drop(self, workload: S) -> list[str]:
        """Remove all runs of a workload that cannot be loaded; returns their keys."""
        return list(self.waiting.pop(workload, ()))

    def _choose(self, worker: int) -> S | None:
        own = self.loaded.get(worker)
        if own is not None and self.waiting.get(own):
            return own
        busy = Counter(workload for other, workload in self.loaded.items() if other != worker)
        best, most = None, 0.0
        for workload, keys in self.waiting.items():
            if not keys or not self.fits(worker, workload):
                continue
            left = len(keys) * self.run_seconds(workload) / (busy[workload] + 1)
            gain = left - self.load_seconds(workload) if busy[workload] else left
            if gain > most:
                best, most = workload, gain
        return best
