"""Measure everything that docs/importance.md reports, into CSV files of docs/importance, from which report.py makes the rest.

    python bench/importance/measure.py MODEL [MODEL...] [--parts scores,subsets] [--minutes 60]

Claims 1 to 4: subsets.csv; claim 5: scores.csv; what a budget buys: allocations.csv.

A model of few blocks has few allocations of two levels: all of them are tried once (2^blocks), so that every order's curve,
and the true best for every number of low blocks, is read off one table. The same is done for pruning. Deeper models are
measured along every order. Scores see calibration text, allocations are judged on other text.

MODEL is `bundled`, a model of the shared folder, or a folder (train_depths.py makes those of claim 3). What a file holds
already is not measured again, so that a long measurement can be done in pieces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ROOT, Parts, Row, arguments, bed, in_pieces, read_csv

from fracbit.checkpoint.opened import open_float
from fracbit.importance import SCORES, Unit, average_bits, by_order, exact
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.study.float_model import FloatModel, load_float, measure, replaced, rounded
from fracbit.pipeline.study.texts import reader_of
from fracbit.pipeline.study.variants import losses_of
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.scores import Losses

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
    float_model: FloatModel
    calibration: Tensor
    evaluation: Tensor

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.float_model.weights.units()


def find_study(model: str, calibration: int, evaluation: int, length: int) -> Study:
    where = bed(model, length)
    opened = open_float(where.folder)
    float_model, reader = load_float(opened), reader_of(opened)
    texts = {where.calibration: calibration, where.evaluation: evaluation}
    seen, unseen = (reader.samples(text, samples=count, length=length).ids for text, count in texts.items())
    return Study(where.name, float_model, seen, unseen)


def float_loss(study: Study) -> list[Row]:
    """What was measured on, and the float loss."""
    found = measure(study.float_model, study.evaluation)
    parameters = sum(p.numel() for p in study.float_model.model.parameters())
    return [{"blocks": len(study.units), "parameters": parameters, "float nll": f"{found.nll:.5f}",
             "tokens": found.tokens, "calibration tokens": study.calibration.numel()}]  # fmt: skip


def scores(study: Study, granularity: str, score: str, low: str) -> Iterator[Row]:
    """A score of every unit; `random 3` is that of seed 3."""
    units, level = study.float_model.weights.units(granularity), read_level(low) if low else None  # type: ignore[arg-type]
    name, _, seed = score.partition(" ")
    found = make_scores(study.float_model, units, name, level, study.calibration, int(seed or 0))
    for unit, value in found.values.items():
        yield {"granularity": granularity, "score": score, "low": low, "unit": unit, "value": f"{value:.6g}"}


def masks_of(study: Study, low: str, folder: Path) -> Iterator[tuple[int, ...]]:
    """All choices of the blocks to lower; of deep models those along the orders of every score."""
    count = len(study.units)
    if count <= FEW:
        yield from product((0, 1), repeat=count)
        return
    values: dict[str, list[float]] = {}
    for row in read_csv(folder / "scores.csv"):
        if (row["model"], row["granularity"]) == (study.name, "block") and row["low"] in ("", low):
            values.setdefault(row["score"], []).append(float(row["value"]))
    values["reverse:lim"] = [-value for value in values["lim"]]
    for score in (score for name, score in values.items() if name not in SPARED):
        order = sorted(range(count), key=lambda i: score[i])
        yield from (tuple(int(i in order[:lowered]) for i in range(count)) for lowered in range(count + 1))


def subsets(folder: Path, study: Study, high: str, low: str) -> Iterator[Row]:
    """The loss of every choice of blocks that are lowered from `high` to `low`, or dropped; on each half of the text too."""
    units, schemes = study.units, [read_level(high), None if low == "dropped" else read_level(low)]
    both = [(unit, scheme) for unit in units for scheme in schemes]
    made = [
        scheme and rounded(study.float_model, dict.fromkeys(unit.shapes, scheme)) for unit, scheme in both
    ]
    masks = [mask for mask in masks_of(study, low, folder) if low != "dropped" or not all(mask)]
    for mask, losses in losses_of(study.float_model, masks, lambda b, n: made[2 * b + n], study.evaluation):
        bits = sum(unit.bits(schemes[n]) for n, unit in zip(mask, units, strict=True) if schemes[n])
        figures = {"bits": bits / sum(unit.weights for unit in units), "nll": float(losses.mean()),
                   "even half": float(losses[::2].mean()), "odd half": float(losses[1::2].mean())}  # fmt: skip
        yield {"mask": "".join(map(str, mask))} | {name: f"{figure:.5f}" for name, figure in figures.items()}


def losses_for(study: Study, levels: Sequence, label: str) -> Iterator[tuple[str, Losses]]:
    units = study.float_model.weights.units("linear")
    names = ("weight-error", "gram-error", "gradient", "fisher", "oracle")
    for score in (*names, "lim", "zd", "first", "random") if label == "two" else names:
        yield score, make_losses(study.float_model, units, score, levels, study.calibration)


def allocations(study: Study, levels: str) -> Iterator[Row]:
    """Single linears, two levels or eight, every score, beside uniform schemes."""
    units = study.float_model.weights.units("linear")
    weights = sum(unit.weights for unit in units)

    def row(budget: object, solver: str, score: str, bits: float, predicted: object, schemes: dict) -> Row:
        with replaced(study.float_model, rounded(study.float_model, schemes)):
            nll = measure(study.float_model, study.evaluation, batch=16).nll
        return {"budget": budget, "solver": solver, "score": score, "bits": f"{bits / weights:.5f}",
                "predicted": predicted, "nll": f"{nll:.5f}"}  # fmt: skip

    if levels == "uniform":
        for level in MANY:
            whole = {name: level for unit in units for name in unit.shapes}
            yield row("", "uniform", str(level), sum(unit.bits(level) for unit in units), "", whole)
        return
    schemes = MANY if levels == "many" else read_levels("int4z/64,int2z/64")
    for (score, losses), budget in product(losses_for(study, schemes, levels), BUDGETS):
        asked = average_bits(budget, weights)
        found = {"exact": exact(units, schemes, asked, losses)}
        if levels == "two":
            found["order"] = by_order(units, schemes, asked, losses.scores(1, 0), losses)
        for solver, solution in found.items():
            chosen = dict(solution.allocation(units, schemes).schemes)
            yield row(budget, solver, score, solution.bits, f"{solution.loss:.5f}", chosen)


def measurements(given: argparse.Namespace) -> Parts:
    blind = [name for name in BLIND if name != "random"] + [f"random {seed}" for seed in range(RANDOM)]
    granularities, lows = given.granularities.split(","), given.lows.split(",")
    pairs = [{"high": [high], "low": [low]} for high, low in PAIRS if low in lows]
    parts: dict[str, Parts] = {
        "scores": [
            ("scores.csv", scores, {"granularity": granularities, "score": blind, "low": [""]}),
            ("scores.csv", scores, {"granularity": granularities, "low": LOWS, "score": SEEING}),
        ],
        "subsets": [("subsets.csv", partial(subsets, given.folder), pair) for pair in pairs],
        "allocations": [("allocations.csv", allocations, {"levels": given.levels.split(",")})],
    }
    return [("models.csv", float_loss, {}), *(one for part in given.parts.split(",") for one in parts[part])]


def main() -> None:
    parser = arguments(__doc__, folder=ROOT / "docs" / "importance", minutes=600.0)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", type=int, default=32, help="samples")
    parser.add_argument("--evaluation", type=int, default=300, help="samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument(
        "--lows", default=",".join(low for _, low in PAIRS), help="what blocks are lowered to"
    )
    parser.add_argument("--granularities", default="block,linear")
    parser.add_argument("--levels", default="uniform,two,many")
    parser.add_argument("--parts", default="scores,subsets,allocations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    studies = (find_study(model, given.calibration, given.evaluation, given.length) for model in given.models)
    in_pieces(studies, measurements(given), given.folder, given.minutes)


if __name__ == "__main__":
    main()
