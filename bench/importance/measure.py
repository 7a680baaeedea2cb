"""Measure everything that docs/importance.md reports, into CSV files: python bench/importance/measure.py MODEL [MODEL...].

A model of few blocks has few allocations of two levels: all of them are tried once (2^blocks), so that every order's curve,
and the true best for every number of low blocks, is read off one table. The same is done for pruning. Deeper models are
measured along every order. Scores see calibration text, allocations are judged on other text.

MODEL is `bundled`, a model of FRACBIT_SHARED, or a folder. What a CSV file holds already is not measured again, so that a
long measurement can be done in pieces.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fracbit.bundled import bundled_model
from fracbit.importance import SCORES, Unit, average_bits, by_order, exact
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.study.float_model import FloatModel, load_float, measure, replaced, rounded
from fracbit.pipeline.study.texts import samples_of
from fracbit.pipeline.study.variants import losses_of
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.scores import Losses

UNFINISHED = 75
SHARED = Path(os.environ.get("FRACBIT_SHARED", "../shared"))
HIGH = "int4z/64"
PAIRS = ((HIGH, "int2z/64"), (HIGH, "int3z/64"), ("int8z/64", "int4z/64"), (HIGH, "dropped"))
LOWS = ("int2z/64", "int3z/64", "int4z/64")
MANY = read_levels("int2z/64,int3z/64,int4z/64,nf2/64,nf3/64,nf4/64,nf3/32,int4z/64 out")
BLIND = [name for name, method in SCORES.items() if method.plain is not None]
SEEING = [name for name, method in SCORES.items() if method.of_scheme is not None]
RANDOM = 16
BUDGETS = (2.8, 3.4, 3.9)
FEW = 6  # blocks, up to which all 2^blocks allocations are tried
SPARED = [f"random {seed}" for seed in range(8, RANDOM)]  # orders along which deeper models are not measured


@dataclass(frozen=True)
class Study:
    """A model and its texts: `calibration` that scores see, `evaluation` that allocations are judged on."""

    name: str
    subject: FloatModel
    calibration: Tensor
    evaluation: Tensor

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.subject.weights.units()


class Table:
    """A CSV file that grows by whole measurements, so that an interrupted one is done again and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, **key: object) -> bool:
        return any(all(row[k] == str(v) for k, v in key.items()) for row in read_rows(self.path))

    def add(self, rows: Iterable[dict[str, object]]) -> None:
        rows = list(rows)
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def find_study(model: str, calibration: int, evaluation: int, length: int) -> Study:
    shared = SHARED / "models" / Path(model).name
    tales = shared.is_dir() and not Path(model).is_dir()
    folder = bundled_model() if model == "bundled" else shared if tales else Path(model)
    subject = load_float(folder)
    texts = ("bundled:train", "bundled:held-out")
    if tales:
        texts = tuple(
            f"{SHARED / 'data'}/tales-{kind}.u16?length=512&keep={length}"
            for kind in ("calibration", "evaluation")
        )  # type: ignore[assignment]
    seen, unseen = (
        samples_of(text, str(folder), subject, count, length)
        for text, count in zip(texts, (calibration, evaluation), strict=True)
    )
    return Study(folder.name if model != "bundled" else "bundled", subject, seen, unseen)


def measure_scores(study: Study, granularity: str, out: Path) -> None:
    """Every score of every unit; those that know the scheme for every low level."""
    table, units = Table(out / "scores.csv"), study.subject.weights.units(granularity)  # type: ignore[arg-type]
    jobs = [(score, "", seed) for score in BLIND for seed in range(RANDOM if score == "random" else 1)]
    for score, low, seed in (*jobs, *((score, low, 0) for low in LOWS for score in SEEING)):
        label = f"random {seed}" if score == "random" else score
        key = {"model": study.name, "granularity": granularity, "score": label, "low": low}
        if not table.has(**key):
            level = read_level(low) if low else None
            found = make_scores(study.subject, units, score, level, study.calibration, seed)
            table.add({**key, "unit": unit, "value": f"{value:.6g}"} for unit, value in found.values.items())


def masks_of(study: Study, low: str, out: Path) -> Iterator[tuple[int, ...]]:
    """All choices of the blocks to lower; of deep models those along the orders of every score."""
    count = len(study.units)
    if count <= FEW:
        yield from itertools.product((0, 1), repeat=count)
        return
    values: dict[str, list[float]] = {}
    for row in read_rows(out / "scores.csv"):
        if (row["model"], row["granularity"]) == (study.name, "block") and row["low"] in ("", low):
            values.setdefault(row["score"], []).append(float(row["value"]))
    values["reverse:lim"] = [-value for value in values["lim"]]
    for name, score in values.items():
        order = sorted(range(count), key=lambda i: score[i])
        if name not in SPARED:
            for lowered in range(count + 1):
                yield tuple(int(i in order[:lowered]) for i in range(count))


def measure_subsets(study: Study, high: str, low: str, out: Path) -> None:
    """The loss of every choice of blocks that are lowered from `high` to `low`, or dropped; on each half of the text too."""
    table, units = Table(out / "subsets.csv"), study.units
    if table.has(model=study.name, high=high, low=low):
        return
    schemes = [read_level(high), None if low == "dropped" else read_level(low)]
    weights = [
        [rounded(study.subject, dict.fromkeys(unit.shapes, scheme)) if scheme else None for scheme in schemes]
        for unit in units
    ]
    masks = [mask for mask in masks_of(study, low, out) if low != "dropped" or not all(mask)]
    rows = []
    for mask, losses in losses_of(study.subject, masks, lambda b, n: weights[b][n], study.evaluation):
        bits = sum(unit.bits(schemes[n]) for n, unit in zip(mask, units, strict=True) if schemes[n])
        halves = losses[::2].mean(), losses[1::2].mean()
        rows.append(
            {"model": study.name, "high": high, "low": low, "mask": "".join(map(str, mask)),
             "bits": f"{bits / sum(unit.weights for unit in units):.5f}", "nll": f"{float(losses.mean()):.5f}",
             "even half": f"{float(halves[0]):.5f}", "odd half": f"{float(halves[1]):.5f}"}
        )  # fmt: skip
    table.add(rows)


def measure_float(study: Study, out: Path) -> None:
    """What was measured on, and the float loss."""
    table = Table(out / "models.csv")
    if not table.has(model=study.name):
        found = measure(study.subject, study.evaluation)
        parameters = sum(p.numel() for p in study.subject.model.parameters())
        table.add(
            [{"model": study.name, "blocks": len(study.units), "parameters": parameters, "float nll": f"{found.nll:.5f}",
              "tokens": found.tokens, "calibration tokens": study.calibration.numel()}]
        )  # fmt: skip


def losses_for(study: Study, levels: Sequence, label: str) -> Iterator[tuple[str, Losses]]:
    units = study.subject.weights.units("linear")
    names = ("weight-error", "gram-error", "gradient", "fisher", "oracle")
    for score in (*names, "lim", "zd", "first", "random") if label == "two" else names:
        yield score, make_losses(study.subject, units, score, levels, study.calibration)


def measure_allocations(study: Study, label: str, out: Path) -> None:
    """Single linears, two levels or eight, every score, beside uniform schemes."""
    table, subject = Table(out / "allocations.csv"), study.subject
    if table.has(model=study.name, levels=label):
        return
    units = subject.weights.units("linear")
    weights = sum(unit.weights for unit in units)
    rows = []

    def add(budget: object, solver: str, score: str, bits: float, predicted: object, schemes: dict) -> None:
        with replaced(subject, rounded(subject, schemes)):
            nll = measure(subject, study.evaluation, batch=16).nll
        rows.append(
            {"model": study.name, "levels": label, "budget": budget, "solver": solver, "score": score,
             "bits": f"{bits / weights:.5f}", "predicted": predicted, "nll": f"{nll:.5f}"}
        )  # fmt: skip

    if label == "uniform":
        for level in MANY:
            whole = {n: level for u in units for n in u.shapes}
            add("", "uniform", str(level), sum(unit.bits(level) for unit in units), "", whole)
    else:
        levels = MANY if label == "many" else read_levels("int4z/64,int2z/64")
        for score, losses in losses_for(study, levels, label):
            for budget in BUDGETS:
                asked = average_bits(budget, weights)
                found = {"exact": exact(units, levels, asked, losses)}
                if label == "two":
                    found["order"] = by_order(units, levels, asked, losses.scores(1, 0), losses)
                for solver, solution in found.items():
                    schemes = dict(solution.allocation(units, levels).schemes)
                    add(budget, solver, score, solution.bits, f"{solution.loss:.5f}", schemes)
    table.add(rows)


def main() -> None:
    """Measure what is asked for and not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/importance"))
    parser.add_argument("--calibration", type=int, default=32, help="samples")
    parser.add_argument("--evaluation", type=int, default=300, help="samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument(
        "--lows",
        default="int2z/64,int3z/64,int4z/64,dropped",
        help="of the pairs, what blocks are lowered to",
    )
    parser.add_argument("--granularities", default="block,linear")
    parser.add_argument("--levels", default="uniform,two,many")
    parser.add_argument("--parts", default="scores,subsets,allocations")
    parser.add_argument(
        "--minutes",
        type=float,
        default=600.0,
        help=f"begin nothing new after so long, and exit with {UNFINISHED}",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    for model in given.models:
        study = find_study(model, given.calibration, given.evaluation, given.length)
        for name, job in jobs_of(study, given):
            if time.monotonic() - started > 60 * given.minutes:
                raise SystemExit(UNFINISHED)
            begun = time.monotonic()
            job()
            if time.monotonic() - begun > 1:
                print(f"{study.name} {name}: {time.monotonic() - begun:.0f} s", flush=True)


def jobs_of(study: Study, given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to measure of a model, each by its name; what is measured already takes no time."""
    yield "float", partial(measure_float, study, given.out)
    for granularity in given.granularities.split(",") if "scores" in given.parts else ():
        yield f"scores {granularity}", partial(measure_scores, study, granularity, given.out)
    for high, low in PAIRS if "subsets" in given.parts else ():
        if low in given.lows.split(","):
            yield f"{high} to {low}", partial(measure_subsets, study, high, low, given.out)
    for label in given.levels.split(",") if "allocations" in given.parts else ():
        yield f"allocations {label}", partial(measure_allocations, study, label, given.out)


if __name__ == "__main__":
    main()
