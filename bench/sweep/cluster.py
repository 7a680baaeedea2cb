"""A cluster's sweep, simulated: 35,000 runs of 34 models up to 176B, with the engine's own queue deciding who does what.

    python bench/sweep/cluster.py [--nodes 1 4 16] [--dollars 2.5]
    python bench/sweep/cluster.py --rows docs/scaling/rows [--cores 1 8 64]

Runs are dummies of realistic length: quantizing and evaluating a model of N parameters take the times of `Rates`. The queue is
`fracbit.sweeps.queue.Queue`, the one that Ray's driver uses; the clock is simulated, so that months take seconds. Workers die
now and then, which loses the run in flight and costs a loading, as in the engine. With `--rows` the runs are those of a study
that was measured, each as long as it took there.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from fracbit.sweeps.queue import Queue, Workload

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
    """What a GPU and a node do. `flops`: of dense bf16 products in evaluation; `quantize`: weights quantized and written back a
    second and GPU; `host`: bytes a second and GPU from the kept copy in the host's memory; `load`: bytes a second from shared
    storage into a node; `start`: seconds before a new worker is ready;
    `hours_between_deaths` of a worker; `overhead`: seconds a run that do not depend on the model.
    """

    flops: float = 350e12
    quantize: float = 2e9
    host: float = 50e9
    load: float = 2e9
    start: float = 30.0
    overhead: float = 0.5
    hours_between_deaths: float = 200.0


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
        items = [
            (model, f"{model.name}/{index}")
            for model in models()
            if model.gpus == size
            for index in range(each)
        ]
        parts.append(
            sweep(nodes * GPUS_PER_NODE // size, size, items, tokens, rates, stay, random.Random(seed))
        )
    return Result(*(sum(getattr(part, field.name) for part in parts) for field in fields(Result)))


def sweep(
    workers: int,
    gpus: int,
    items: list[tuple[Model, str]],
    tokens: float,
    rates: Rates,
    stay: bool,
    chance: random.Random,
) -> Result:
    """One sweep with `workers` of `gpus` each."""

    def seconds(model: Model, _: str) -> float:
        return run_seconds(model, rates, tokens)

    def loading(model: Model) -> float:
        return load_seconds(model, rates)

    queue = Queue(items)  # as the driver makes it: it knows no times beforehand
    take = queue.take if stay else shuffled(items, chance)
    return play([gpus] * workers, take, queue, seconds, loading, rates, chance)


def play(
    sizes: list[int], take: Callable[[int], tuple[S, str] | None], queue: Queue[S],
    seconds: Callable[[S, str], float], loading: Callable[[S], float], rates: Rates, chance: random.Random,
) -> Result:  # fmt: skip
    """The events: each worker is free at a time, takes a run, loads if it must, and is free again."""
    free = [(0.0, worker) for worker in range(len(sizes))]
    heapq.heapify(free)
    has: dict[int, S] = {}
    ends = [0.0] * len(sizes)
    busy = loaded = 0.0
    deaths = 0
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
        ends[worker] = now + load + length
        heapq.heappush(free, (ends[worker], worker))
    end = max(ends)
    paid = end * sum(sizes)
    return Result(end / 3600, busy / 3600, loaded / 3600, (paid - busy - loaded) / 3600, deaths)


def shuffled(
    items: list[tuple[Model, str]], chance: random.Random
) -> Callable[[int], tuple[Model, str] | None]:
    """A plain job queue, for comparison: the next run, whatever the worker has loaded."""
    waiting = list(items)
    chance.shuffle(waiting)
    return lambda worker: waiting.pop() if waiting else None


def replay(folder: Path, cores: list[int]) -> None:
    """Print how long a measured study takes on so many cores, its runs as long as they were."""
    from fracbit.sweeps.parquet import import_parquet
    from fracbit.sweeps.queue import source_of

    rows = {row.key: row for row in import_parquet(folder) if row.status == "done"}
    print("| cores | minutes | working | starting | idle | lost workers |\n|---|---|---|---|---|---|")
    for count in cores:
        queue: Queue[Workload] = Queue([(source_of(row.run), key) for key, row in rows.items()])
        result = play(
            [1] * count,
            queue.take,
            queue,
            lambda _, key: rows[key].seconds,
            lambda _: CPU_START,
            Rates(),
            random.Random(0),
        )
        shares = " | ".join(
            f"{abs(100 * part / result.gpu_hours):.0f} %"
            for part in (result.busy, result.loading, result.idle)
        )
        print(f"| {count} | {60 * result.hours:.1f} | {shares} | {result.deaths} |")


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--dollars", type=float, default=2.5, help="for a GPU-hour")
    parser.add_argument("--rows", type=Path, help="replay a study from its Parquet")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2, 8, 32, 128])
    arguments = parser.parse_args()
    if arguments.rows:
        return replay(arguments.rows, arguments.cores)
    rates = Rates()
    print("| model | GPUs | load | quantize | perplexity | tasks |\n|---|---|---|---|---|---|")
    for name in ("Pythia 0.35B", "OPT 6.7B", "OPT 30B", "OPT 66B", "BLOOM 176B"):
        model = next(model for model in models() if model.name == name)
        parts = [
            run_seconds(model, replace(rates, overhead=0), tokens)
            for tokens in (0, PERPLEXITY_TOKENS, TASK_TOKENS)
        ]
        figures = [load_seconds(model, rates), parts[0], parts[1] - parts[0], parts[2] - parts[0]]
        print(f"| {name} | {model.gpus} | " + " | ".join(f"{figure:.3g} s" for figure in figures) + " |")
    studies = {
        "perplexity only": PERPLEXITY_TOKENS,
        "perplexity and four tasks": PERPLEXITY_TOKENS + TASK_TOKENS,
    }
    for text, tokens in studies.items():
        print(f"\n{text}\n")
        print(
            "| nodes | hours | GPU-hours | working | loading | idle | lost workers | dollars | plain queue, hours |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for nodes in arguments.nodes:
            result, naive = (simulate(nodes, tokens, rates, stay) for stay in (True, False))
            shares = " | ".join(
                f"{100 * part / result.gpu_hours:.0f} %"
                for part in (result.busy, result.loading, result.idle)
            )
            dollars = result.gpu_hours * arguments.dollars
            print(f"| {nodes} | {result.hours:.1f} | {result.gpu_hours:,.0f} | {shares} | {result.deaths} "
                  f"| {dollars:,.0f} | {naive.hours:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
