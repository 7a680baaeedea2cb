"""The engine on Ray: the same `Workbench.measure`, in actors that keep their model loaded (extra: `fracbit[ray]`).

The driver holds the store and the queue; an actor gets one run at a time and returns a row. When an actor dies (killed,
out of memory, node lost), a new one is started and the run is tried again, `retries` times; then its row is a failed
one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fracbit.errors import OutputError, RecipeError
from fracbit.records.extras import check_extra
from fracbit.records.row import Row, Run, failed_row
from fracbit.sweeps.address import check_address
from fracbit.sweeps.queue import Queue, Workload, workload_of
from fracbit.sweeps.workbench import Failure, Workbench, explain, open_bench


class Bench:
    """An actor. It holds at most one workbench, which it replaces when a run needs another workload."""

    def __init__(self, root: str, device: str, threads: int, keep_going: bool = False) -> None:
        """`threads` for torch in this worker: its share of the machine."""
        import torch

        torch.set_num_threads(threads)
        self.root, self.device, self.keep_going = Path(root), device, keep_going
        self.bench: Workbench | None = None

    def measure(self, run_json: str) -> str:
        """From a run as JSON to its row as JSON."""
        run = Run.model_validate_json(run_json)
        workload = workload_of(run)
        if self.bench is None or self.bench.workload != workload:
            self.bench = None
            opened = open_bench(workload, self.root, self.device, self.keep_going)
            if isinstance(opened, Failure):
                return opened.row(run).model_dump_json()
            self.bench = opened
        return self.bench.measure(run, self.keep_going).model_dump_json()

    def pid(self) -> int:
        """The process id of this worker."""
        return os.getpid()


@dataclass(frozen=True)
class OnRay:
    """The engine of a Ray cluster, or of one started on this machine when there is no `address`.

    - `workers`: number of actors; None: as many as the CPUs, GPUs and memory of the cluster hold at the start.
    - `cpus`, `gpus`, `memory` (bytes): what each actor takes; `retries`: of a run whose worker died.
    - `root`: where relative paths of the sweep start; every node must see the same files there.
    - `keep_going`: a bug of fracbit becomes a failed row with its traceback; without it the sweep stops there.
    """

    root: Path
    address: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    retries: int = 2
    keep_going: bool = False

    def measure(
        self, queue: Queue[Workload], runs: dict[str, Run], claim: Callable[[str], bool]
    ) -> Iterator[Row]:
        """See `Engine.measure`."""
        ray = _ray()
        _connect(ray, self.address)
        pool = _Pool(ray, self, queue=queue, runs=runs, claim=claim)
        try:
            yield from pool.rows()
        finally:
            pool.stop()


class _Pool:
    """Actors and the run of each. Lives as long as one `measure`."""

    def __init__(
        self,
        ray: Any,
        engine: OnRay,
        queue: Queue[Workload],
        runs: dict[str, Run],
        claim: Callable[[str], bool],
    ) -> None:
        self.ray, self.engine, self.queue, self.runs, self.claim = ray, engine, queue, runs, claim
        options: dict[str, Any] = {"num_cpus": engine.cpus, "num_gpus": engine.gpus, "max_restarts": 0}
        if engine.memory:
            options["memory"] = engine.memory
        self.make = ray.remote(Bench).options(**options)
        self.actors: dict[int, Any] = {}
        self.busy: dict[Any, tuple[int, Workload, str]] = {}
        self.held: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.next_worker = 0

    def rows(self) -> Iterator[Row]:
        """Rows as they come."""
        for _ in range(min(self._wanted(), len(self.queue))):
            self._hire()
        while self.busy:
            done, _ = self.ray.wait(list(self.busy), num_returns=1)
            worker, workload, key = self.busy.pop(done[0])
            try:
                yield Row.model_validate_json(self.ray.get(done[0]))
                self._assign(worker)
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError) as error:
                self._bury(worker)
                yield from self._try_again(workload, key, error)
                self._hire()

    def stop(self) -> None:
        """End the actors. Their current runs are lost; a later sweep measures them."""
        for actor in self.actors.values():
            self.ray.kill(actor)
        if self.engine.address is None:
            self.ray.shutdown()

    def _wanted(self) -> int:
        if self.engine.workers is not None:
            return self.engine.workers
        there = self.ray.cluster_resources()
        by_cpu = there.get("CPU", 1) / self.engine.cpus if self.engine.cpus else float("inf")
        by_gpu = there.get("GPU", 0) / self.engine.gpus if self.engine.gpus else float("inf")
        by_memory = there.get("memory", 0) / self.engine.memory if self.engine.memory else float("inf")
        count = int(min(by_cpu, by_gpu, by_memory))
        if count < 1:
            raise RecipeError(
                f"a worker needs {self.engine.cpus} CPUs, {self.engine.gpus} GPUs, {self.engine.memory or 0} bytes; "
                f"the cluster has {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs, "
                f"{there.get('memory', 0):.3g} bytes: ask for less per worker"
            )
        return count

    def _hire(self) -> None:
        worker, self.next_worker = self.next_worker, self.next_worker + 1
        # Ray shows a worker only its own GPUs; several GPUs hold one model together.
        gpus = self.engine.gpus
        device = "auto" if gpus > 1 else "cuda" if gpus else "cpu"
        self.actors[worker] = self.make.remote(
            str(self.engine.root.resolve()), device, max(1, int(self.engine.cpus)), self.engine.keep_going
        )
        self._assign(worker)

    def _assign(self, worker: int) -> None:
        """Give a worker its next run, or end it when no run is left for it."""
        while (taken := self.queue.take(worker)) is not None:
            workload, key = taken
            if key in self.held or self.claim(key):
                self.held.add(key)
                task = self.actors[worker].measure.remote(self.runs[key].model_dump_json())
                self.busy[task] = (worker, workload, key)
                return
        self.ray.kill(self.actors[worker])
        self._bury(worker)

    def _bury(self, worker: int) -> None:
        self.actors.pop(worker, None)
        self.queue.leave(worker)

    def _try_again(self, workload: Workload, key: str, error: Exception) -> Iterator[Row]:
        self.deaths[key] += 1
        if self.deaths[key] <= self.engine.retries:
            self.queue.give_back(workload, key)
        else:
            reason = str(error).strip().splitlines()[0]
            yield failed_row(self.runs[key], f"its worker died {self.deaths[key]} times, last: {reason}")


def _ray() -> Any:
    check_extra("--ray", "ray", "ray", OutputError)
    import ray

    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster, or start one here. Raises `OutputError` within 15 s when the address does not answer."""
    if ray.is_initialized():
        return
    if address is None:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        return
    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OutputError(f"the Ray cluster at {address} cannot be joined: {explain(error)}") from error
