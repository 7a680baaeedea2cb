"""A cluster's sweep, simulated: 35,000 runs of 34 models up to 176B, with the engine's own queue deciding who does what.
Makes every table of docs/cluster.md but that of what bounds a run.

    python bench/sweep/cluster.py [--nodes 1 4 16] [--dollars 2.5]
    python bench/sweep/cluster.py --rows docs/scaling/rows [--cores 1 8 64]

Runs are dummies of realistic length: quantizing and evaluating a model of N parameters take the times of `Rates`. The queue is
`fracbit.sweeps.queue.Queue`, the one that Ray's driver uses; the clock is simulated, so that months take seconds. Workers die
now and then, which loses the run in flight and costs a loading, as in the engine. With `--rows` the runs are those of a study
that was measured, each as long as it took there.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import arguments, table

from fracbit.sweeps.parquet import import_parquet
from fracbit.sweeps.queue import Queue, Workload, workload_of

S = TypeVar("S", bound=Hashable)
BILLIONS = {
    "OPT": (0.125, 0.35, 1.3, 2.7, 6.7, 13, 30, 66, 175),
    "Pythia": (0.019, 0.125, 0.35, 0.8, 1.3, 2.7, 6.7, 13, 20),
    "GPT-2": (0.124, 0.355, 0.774, 1.5),
    "BLOOM": (0.56, 1.1, 1.7, 3, 7.1, 176),
    "BLOOMZ": (0.56, 1.1, 1.7, 3, 7.1, 176),
}
RUNS = 35_000
GPUS_PER_NODE = 8
GPU_BYTES = 80e9
PERPLEXITY_TOKENS = 0.25e6
CPU_START = 7.0  # seconds until a worker has imported torch and loaded a model, by bench/sweep/rate.py
TASK_TOKENS = 4.2e6  # LAMBADA, PIQA, WinoGrande, HellaSwag: examples x choices x tokens


@dataclass(frozen=True)
class Rates:
    """What a GPU and a node do; rates are for a second."""

    flops: float = 350e12  # of a GPU, dense bf16 products in evaluation
    quantize: float = 2e9  # weights that a GPU quantizes and writes back
    host: float = 50e9  # bytes to a GPU from the kept copy in the host's memory
    load: float = 2e9  # bytes from shared storage into a node
    start: float = 30.0  # seconds before a new worker is ready
    overhead: float = 0.5  # seconds a run that do not depend on the model
    hours_between_deaths: float = 200.0  # of a worker


@dataclass(frozen=True)
class Model:
    """A model of the study: its name, parameters, and the GPUs that hold it in bf16 with room for activations."""

    name: str
    parameters: float

    @property
    def gpus(self) -> int:
        """1, 2, 4 or 8."""
        need = 1.15 * 2 * self.parameters / GPU_BYTES
        return next(count for count in (1, 2, 4, 8) if count >= need)


@dataclass(frozen=True)
class Result:
    """A simulated sweep. `busy`, `loading`, `idle`: GPU-hours; `hours`: from start to end."""

    hours: float
    busy: float
    loading: float
    idle: float
    deaths: int

    @property
    def gpu_hours(self) -> float:
        """All that is paid for."""
        return self.busy + self.loading + self.idle

    def shares(self) -> list[str]:
        """Of the hours that are paid for: working, loading, idle."""
        return [f"{abs(100 * part / self.gpu_hours):.0f} %" for part in (self.busy, self.loading, self.idle)]


def models() -> list[Model]:
    """The 34 models."""
    return [Model(f"{family} {size:g}B", size * 1e9) for family, sizes in BILLIONS.items() for size in sizes]


def run_seconds(model: Model, rates: Rates, tokens: float) -> float:
    """One run: fetch the kept copy and quantize it on every GPU of the worker, then a forward pass over the tokens."""
    quantize = model.parameters * (1 / rates.quantize + 2 / rates.host) / model.gpus
    evaluate = 2 * model.parameters * tokens / (rates.flops * model.gpus)
    return rates.overhead + quantize + evaluate


def load_seconds(model: Model, rates: Rates) -> float:
    """From shared storage into a worker; a node's bandwidth is its GPUs' to share."""
    return rates.start + 2 * model.parameters / (rates.load * model.gpus / GPUS_PER_NODE)


def simulate(nodes: int, tokens: float, rates: Rates, stay: bool = True, seed: int = 0) -> Result:
    """Play the whole study: one sweep for each number of GPUs a model needs (`--gpus 1`, `2`, `8`), one after the other.

    Without `stay`, runs come in random order and workers do not look at what they have loaded.
    """
    each = RUNS // len(models())
    parts = []
    for size in sorted({model.gpus for model in models()}):
        own = [model for model in models() if model.gpus == size]
        items = [(model, f"{model.name}/{n}") for model in own for n in range(each)]
        chance, queue = (
            random.Random(seed),
            Queue(items),
        )  # which knows no times beforehand, as the driver makes it
        take = queue.take if stay else shuffled(items, chance)
        parts.append(play(
            [size] * (nodes * GPUS_PER_NODE // size), take, queue, lambda model, _: run_seconds(model, rates, tokens),
            lambda model: load_seconds(model, rates), rates, chance,
        ))  # fmt: skip
    return Result(*(sum(getattr(part, field.name) for part in parts) for field in fields(Result)))


def play(
    sizes: list[int], take: Callable[[int], tuple[S, str] | None], queue: Queue[S],
    seconds: Callable[[S, str], float], loading: Callable[[S], float], rates: Rates, chance: random.Random,
) -> Result:  # fmt: skip
    """The events: each worker is free at a time, takes a run, loads if it must, and is free again."""
    free = [(0.0, worker) for worker in range(len(sizes))]
    heapq.heapify(free)
    has: dict[int, S] = {}
    end, busy, loaded, deaths = 0.0, 0.0, 0.0, 0
    while free:
        now, worker = heapq.heappop(free)
        taken = take(worker)
        if taken is None:
            continue
        model, key = taken
        load = 0.0 if has.get(worker) == model else loading(model)
        length = seconds(model, key)
        died = chance.random() < (load + length) / 3600 / rates.hours_between_deaths
        loaded += load * sizes[worker]
        busy += length * sizes[worker]
        has[worker] = model
        if died:
            deaths += 1
            queue.leave(worker)
            queue.give_back(model, key)
            has.pop(worker)
        heapq.heappush(free, (now + load + length, worker))
        end = max(end, now + load + length)
    paid = end * sum(sizes)
    return Result(end / 3600, busy / 3600, loaded / 3600, (paid - busy - loaded) / 3600, deaths)


def shuffled(items: list[tuple[S, str]], chance: random.Random) -> Callable[[int], tuple[S, str] | None]:
    """A plain job queue, for comparison: the next run, whatever the worker has loaded."""
    waiting = list(items)
    chance.shuffle(waiting)
    return lambda worker: waiting.pop() if waiting else None


def replay(folder: Path, cores: list[int]) -> None:
    """Print how long a measured study takes on so many cores, its runs as long as they were."""
    rows = {row.key: row for row in import_parquet(folder) if row.status == "done"}
    lines = []
    for count in cores:
        queue: Queue[Workload] = Queue([(workload_of(row.run), key) for key, row in rows.items()])
        result = play(
            [1] * count, queue.take, queue, lambda _, key: rows[key].seconds, lambda _: CPU_START, Rates(), random.Random(0)
        )  # fmt: skip
        lines.append([count, f"{60 * result.hours:.1f}", *result.shares(), result.deaths])
    table("cores | minutes | working | starting | idle | lost workers", lines)


def parts_of_runs(rates: Rates) -> None:
    """Print what loading, quantizing and evaluating take, for some models."""
    named, lines = {model.name: model for model in models()}, []
    for name in ("Pythia 0.35B", "OPT 6.7B", "OPT 30B", "OPT 66B", "BLOOM 176B"):
        model, own = named[name], replace(rates, overhead=0)
        parts = [run_seconds(model, own, tokens) for tokens in (0, PERPLEXITY_TOKENS, TASK_TOKENS)]
        figures = [load_seconds(model, rates), parts[0], parts[1] - parts[0], parts[2] - parts[0]]
        lines.append([name, model.gpus, *(f"{figure:.3g} s" for figure in figures)])
    table("model | GPUs | load | quantize | perplexity | tasks", lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--dollars", type=float, default=2.5, help="for a GPU-hour")
    parser.add_argument("--rows", type=Path, help="replay a study from its Parquet")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2, 8, 32, 128])
    given = parser.parse_args()
    if given.rows:
        return replay(given.rows, given.cores)
    rates = Rates()
    parts_of_runs(rates)
    head = "nodes | hours | GPU-hours | working | loading | idle | lost workers | dollars"
    for text, tasks in (("perplexity only", 0.0), ("perplexity and four tasks", TASK_TOKENS)):
        tokens, lines = PERPLEXITY_TOKENS + tasks, []
        for nodes in given.nodes:
            result, naive = (simulate(nodes, tokens, rates, stay) for stay in (True, False))
            paid = [f"{result.hours:.1f}", f"{result.gpu_hours:,.0f}", *result.shares(), result.deaths]
            lines.append([nodes, *paid, f"{result.gpu_hours * given.dollars:,.0f}", f"{naive.hours:.1f}"])
        table(f"{head} | plain queue, hours", lines, text)


if __name__ == "__main__":
    main()
