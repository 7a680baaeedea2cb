"""Measure everything that docs/importance.md reports, into CSV files: python bench/importance/measure.py MODEL [MODEL...].

A model of few blocks has few allocations of two levels: all of them are tried once (2^blocks), so that every order's curve,
and the true best for every number of low blocks, is read off one table. The same is done for pruning.
Scores see calibration text, allocations are judged on other text.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch

from fracbit.importance import SCORES, average_bits, by_order, exact
from fracbit.pipeline.prune import without
from fracbit.pipeline.score import make_losses, make_scores
from fracbit.pipeline.subject import Subject, load_subject, measure, replaced, rounded
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.scores import Losses

SHARED = Path(os.environ.get("FRACBIT_SHARED", "../shared"))
PAIRS = (("int4z/64", "int2z/64"), ("int4z/64", "int3z/64"), ("int8z/64", "int4z/64"))
MANY = read_levels("int2z/64,int3z/64,int4z/64,nf2/64,nf3/64,nf4/64,nf3/32,int4z/64 out")
BLIND = [name for name, method in SCORES.items() if method.plain is not None]
SEEING = [name for name, method in SCORES.items() if method.of_scheme is not None]
BUDGETS = (2.8, 3.4, 3.9)


def tokens(kind: str, documents: int, length: int) -> torch.Tensor:
    rows = np.fromfile(SHARED / "data" / f"tales-{kind}.u16", dtype="<u2").reshape(-1, 512)
    return torch.from_numpy(rows[:documents, :length].astype(np.int64))


class Table:
    """A CSV file that grows by a line at a time, so that an interrupted measurement keeps what it has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **row: object) -> None:
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def measure_scores(subject: Subject, name: str, calibration: torch.Tensor, out: Path, pairs: tuple) -> None:
    table = Table(out / "scores.csv")
    for granularity in ("block", "linear"):
        units = subject.weights.units(granularity)
        for score in BLIND:
            for seed in range(8 if score == "random" else 1):
                for unit, value in make_scores(
                    subject, units, score, ids=calibration, seed=seed
                ).values.items():
                    label = f"random {seed}" if score == "random" else score
                    table.add(
                        model=name, granularity=granularity, score=label, low="", unit=unit, value=value
                    )
        for low in dict.fromkeys(pair[1] for pair in pairs):
            for score in SEEING:
                for unit, value in make_scores(
                    subject, units, score, read_level(low), calibration
                ).values.items():
                    table.add(
                        model=name, granularity=granularity, score=score, low=low, unit=unit, value=value
                    )


def measure_subsets(subject: Subject, name: str, evaluation: torch.Tensor, out: Path, pairs: tuple) -> None:
    units = subject.weights.units()
    table = Table(out / "subsets.csv")
    weights = sum(unit.weights for unit in units)
    table.add(model=name, high="float", low="float", mask="", bits=16.0, nll=measure(subject, evaluation).nll)
    for high, low in pairs:
        schemes = {"0": read_level(high), "1": read_level(low)}
        done = {
            label: rounded(subject, {n: s for u in units for n in u.shapes}) for label, s in schemes.items()
        }
        for mask in map("".join, itertools.product("01", repeat=len(units))):
            chosen = {n: done[flag][n] for flag, unit in zip(mask, units, strict=True) for n in unit.shapes}
            bits = sum(unit.bits(schemes[flag]) for flag, unit in zip(mask, units, strict=True)) / weights
            with replaced(subject, chosen):
                table.add(
                    model=name, high=high, low=low, mask=mask, bits=bits, nll=measure(subject, evaluation).nll
                )


def measure_pruning(subject: Subject, name: str, evaluation: torch.Tensor, out: Path) -> None:
    """All subsets of blocks dropped, the others at 4 bits."""
    units = subject.weights.units()
    table = Table(out / "pruned.csv")
    high = read_level("int4z/64")
    weights = sum(unit.weights for unit in units)
    with replaced(subject, rounded(subject, {n: high for u in units for n in u.shapes})):
        for mask in map("".join, itertools.product("01", repeat=len(units))):
            dropped = [unit.name for flag, unit in zip(mask, units, strict=True) if flag == "1"]
            if 0 < len(dropped) < len(units):
                bits = sum(unit.bits(high) for unit in units if unit.name not in dropped) / weights
                with without(subject, dropped):
                    table.add(model=name, mask=mask, bits=bits, nll=measure(subject, evaluation).nll)


def measure_allocations(
    subject: Subject, name: str, calibration: torch.Tensor, evaluation: torch.Tensor, out: Path
) -> None:
    """Single linears, two levels or a dozen, every solver and score, beside uniform schemes."""
    table = Table(out / "allocations.csv")
    two = read_levels("int4z/64,int2z/64")
    units = subject.weights.units("linear")
    weights = sum(unit.weights for unit in units)
    for level in (*MANY, read_level("int6z/64")):
        with replaced(subject, rounded(subject, {n: level for u in units for n in u.shapes})):
            bits = sum(unit.bits(level) for unit in units) / weights
            table.add(model=name, budget="", levels="", solver="uniform", score=str(level), bits=bits, predicted="",
                      nll=measure(subject, evaluation).nll)  # fmt: skip
    for label, levels in (("two", two), ("many", MANY)):
        scores = ("weight-error", "gram-error", "gradient", "fisher", "lim", "zd", "first", "random")
        found: dict[str, Losses] = {}
        for score in (*scores, "oracle") if label == "two" else scores[:4]:
            found[score] = make_losses(subject, units, score, levels, calibration)
        for budget in BUDGETS:
            for score, losses in found.items():
                solved = {"exact": exact(units, levels, average_bits(budget, weights), losses)}
                if label == "two":
                    order = losses.scores(1, 0)
                    solved["order"] = by_order(units, levels, average_bits(budget, weights), order, losses)
                for solver, solution in solved.items():
                    with replaced(subject, rounded(subject, solution.allocation(units, levels).schemes)):
                        table.add(model=name, budget=budget, levels=label, solver=solver, score=score,
                                  bits=solution.bits / weights, predicted=solution.loss,
                                  nll=measure(subject, evaluation).nll)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/importance"))
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--length", type=int, default=352)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--parts", default="scores,subsets,pruning,allocations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.models:
        folder = SHARED / "models" / model
        subject = load_subject(folder if folder.is_dir() else model)
        calibration = tokens("calibration", 32, arguments.length)
        evaluation = tokens("evaluation", arguments.documents, arguments.length)
        name, pairs, parts = Path(model).name, PAIRS[: arguments.pairs], arguments.parts.split(",")
        started = time.perf_counter()
        if "scores" in parts:
            measure_scores(subject, name, calibration, arguments.out, pairs)
        if "subsets" in parts:
            measure_subsets(subject, name, evaluation, arguments.out, pairs)
        if "pruning" in parts:
            measure_pruning(subject, name, evaluation, arguments.out)
        if "allocations" in parts:
            measure_allocations(subject, name, calibration, evaluation, arguments.out)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
