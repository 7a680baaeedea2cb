"""Measure everything that docs/lens.md reports, into CSV files of docs/lens, from which report.py makes pictures and sums.

    python bench/lens/measure.py MODEL [MODEL...] [--planted] [--parts curves,schemes] [--minutes 60]

Findings 1 and 2: intensity.csv, schemes.csv; finding 3: clipping.csv; non-uniform quantization: nonuniform.csv,
error-profiles.csv; whether losses add up, and which layers are fragile: linears.csv, modules.csv, blocks.csv.

MODEL is `bundled`, a model of the shared folder, or a folder. What a file holds of a model already is not measured again, so
that a long measurement can be done in pieces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ROOT, Parts, Row, arguments, bed, in_pieces

from fracbit.checkpoint.opened import open_float
from fracbit.perturbation import PERTURBATIONS, best_exponent, error_profile, scheme_error
from fracbit.pipeline.study import lens
from fracbit.pipeline.study.float_model import FloatModel, load_float, measure, replaced
from fracbit.pipeline.study.lens_errors import Error, clip, noise, noise_like, noise_like_clipping, rounding
from fracbit.pipeline.study.planted import plant_outliers
from fracbit.pipeline.study.texts import reader_of
from fracbit.records.allocation import read_level
from fracbit.records.lens import LensPoint
from fracbit.records.scheme import Scheme

SEEDS = (0, 1, 2, 3, 4)
TYPES = ("int", "nf", "power:1/3", "power:1/2", "searched", "kmeans")
AT = 0.15
TARGETS = ("weights", "activations")
SCHEMES = ("int3z/64", "nf3/64", "int4z/row")
PLANTED = ("nonuniform", "clipping")  # what is measured of planted outliers too


@dataclass(frozen=True)
class Study:
    """A model, the text that it is judged on, and its loss there; `name` ends in ` planted` when it has outliers."""

    name: str
    float_model: FloatModel
    ids: Tensor
    base: float

    def change(self) -> float:
        """Of the loss, as the model stands."""
        return measure(self.float_model, self.ids).nll - self.base


def find_study(model: str, documents: int, length: int, planted: bool) -> Study:
    where = bed(model, length)
    opened = open_float(where.folder)
    float_model = load_float(opened)
    ids = reader_of(opened).samples(where.evaluation, samples=documents, length=length).ids
    if planted:
        plant_outliers(float_model, 50.0, 2)
    base = measure(float_model, ids).nll
    return Study(f"{where.name} planted" if planted else where.name, float_model, ids, base)


def rows_of(points: Iterable[LensPoint]) -> Iterator[Row]:
    for row in (point.row() for point in points):
        yield {**row, **{key: f"{row[key]:.6f}" for key in ("intensity", "change", "low", "high")}}


def float_loss(study: Study) -> list[Row]:
    found = measure(study.float_model, study.ids)
    return [{"float nll": f"{found.nll:.5f}", "tokens": found.tokens}]


def curve(intensities: Sequence[float], study: Study, target: str, kind: str) -> Iterator[Row]:
    return rows_of(
        lens.intensity_curves(study.float_model, study.ids, [kind], intensities, target, seeds=SEEDS)
    )  # type: ignore[arg-type]


def scheme_itself(study: Study, kind: str) -> Iterator[Row]:
    """The error a scheme really makes beside noise of its strength in every block."""
    label = kind.removesuffix(" itself")
    scheme = read_level(label)
    assert scheme is not None
    look = partial(lens.probe, study.float_model, study.ids, base=study.base)
    noises = ("gaussian", "uniform", "rademacher", "growing", "shrinking")
    beside = (look(noise_like(noise, scheme), f"{label} as {noise}", seeds=SEEDS) for noise in noises)
    return rows_of([look(rounding(scheme), kind, seeds=(0,)), *beside])


def clipping(study: Study, target: str) -> Iterator[Row]:
    """The largest clipped, beside noise of the same norm on the same elements and everywhere."""
    look = partial(lens.probe, study.float_model, study.ids, target=target, base=study.base)
    found = []
    for share in (0.0001, 0.001, 0.01):
        each = f"{100 * share:g} %"
        clipped = look(clip(share, "tensor"), f"clip {each}", seeds=(0,))
        everywhere = noise("gaussian", max(clipped.intensity, 1e-6), "tensor")
        there = look(noise_like_clipping(share, "tensor"), f"noise there {each}", seeds=SEEDS)
        found += [clipped, there, look(everywhere, f"noise everywhere {each}", seeds=SEEDS)]
    return rows_of(found)


def effects(units: str, study: Study, target: str, kind: str) -> Iterator[Row]:
    """Errors in single linears, in one module over all blocks, or in whole blocks; real schemes for the weights only."""
    named = {
        "linears": {layer: [layer] for layer in study.float_model.weights.layers},
        "modules": lens.per_module(study.float_model),
        "blocks": {unit.name: list(unit.shapes) for unit in study.float_model.weights.units()},
    }[units]
    level = read_level(kind) if "/" in kind else None
    error = noise(kind, AT) if level is None else rounding(level)
    seeds = SEEDS if level is None else (0,)
    return rows_of(lens.unit_effects(study.float_model, study.ids, named, {kind: error}, target, seeds=seeds))  # type: ignore[arg-type]


def fitted(weight: Tensor, dtype: str, bits: int, block: int | str) -> Scheme:
    """The scheme of a type; `searched` is the power type of the exponent that leaves the least error in the tensor at hand."""
    if dtype == "searched":
        return best_exponent(weight, Scheme("int", bits, block))
    return Scheme(dtype, bits, block)


def typed(dtype: str, bits: int, block: int | str) -> Error:
    return lambda x, generator: scheme_error(x, fitted(x.reshape(-1, x.shape[-1]), dtype, bits, block))


def w4(study: Study, setting: str) -> Iterator[Row]:
    """W4 by type and granularity of the scales."""
    weights = study.float_model.weights
    for block, dtype in product(("tensor", "row", 64), TYPES):
        noisy, used = {}, set()
        for layer in weights.layers:
            weight = weights.read(layer)
            scheme = fitted(weight, dtype, 4, block)
            noisy[layer] = weight + scheme_error(weight, scheme)
            used.add(scheme.dtype.removeprefix("power:"))
        exponents = " ".join(sorted(used)) if dtype == "searched" else ""
        with replaced(study.float_model, noisy):
            change = study.change()
        yield {"granularity": str(block), "type": dtype, "change": f"{change:.5f}", "used": exponents}


def activations(study: Study, setting: str) -> Iterator[Row]:
    """Weights per row and activations per tensor, per token and per block of 64 of a token, both of one type."""
    everything = list(study.float_model.weights.layers)
    blocks = {"tensor": "tensor", "row": "token", 64: "block 64"}
    for (block, name), dtype in product(blocks.items(), TYPES):
        with ExitStack() as stack:
            for target, bits, size in zip(TARGETS, setting[1::2], ("row", block), strict=True):
                error = typed(dtype, int(bits), size)
                stack.enter_context(lens.perturbed(study.float_model, error, target, everything, 0))  # type: ignore[arg-type]
            change = f"{study.change():.5f}"
        yield {"granularity": f"activations per {name}", "type": dtype, "change": change, "used": ""}


def profiles(study: Study) -> Iterator[Row]:
    """Error against |x| of the weights of all linears, W4 per row."""
    weights = [study.float_model.weights.read(layer) for layer in study.float_model.weights.layers]
    for dtype in ("int", "nf", "power:1/3", "power:1/2", "kmeans"):
        scheme = Scheme(dtype, 4, "row")
        found = [error_profile(weight, scheme_error(weight, scheme), "row", 12) for weight in weights]
        for size, error, _ in np.mean(np.array(found, dtype=float), 0):
            yield {"type": dtype, "size": f"{size:.5f}", "error": f"{error:.5f}"}


def measurements(given: argparse.Namespace) -> Parts:
    """What is asked for; of planted outliers only where outliers matter most."""
    intensities = [float(x) for x in given.intensities.split(",")]
    real, noises = ["int4z/64", "int3z/64", "int2z/64"], ["gaussian", "growing", "shrinking"]
    effect_parts: Parts = []
    for units in given.effects.split(","):
        own = noises[:1] if units == "linears" else noises
        for target, kinds in (("weights", own + real), ("activations", own)):
            keys = {"target": [target], "kind": kinds}
            effect_parts.append((f"{units}.csv", partial(effects, units), keys))
    curve_keys = {"target": TARGETS, "kind": PERTURBATIONS}
    parts: dict[str, Parts] = {
        "nonuniform": [
            ("nonuniform.csv", w4, {"setting": ["W4"]}),
            ("nonuniform.csv", activations, {"setting": ["W8A8", "W4A8", "W8A4"]}),
            ("error-profiles.csv", profiles, {}),
        ],
        "curves": [("intensity.csv", partial(curve, intensities), curve_keys)],
        "schemes": [("schemes.csv", scheme_itself, {"kind": [f"{label} itself" for label in SCHEMES]})],
        "clipping": [("clipping.csv", clipping, {"target": TARGETS})],
        "effects": effect_parts,
    }
    asked = [part for part in given.parts.split(",") if part in PLANTED or not given.planted]
    return [("models.csv", float_loss, {}), *(one for part in asked for one in parts[part])]


def main() -> None:
    parser = arguments(__doc__, folder=ROOT / "docs" / "lens", minutes=600.0)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--intensities", default="0.03,0.06,0.12,0.25")
    parser.add_argument("--parts", default="nonuniform,curves,schemes,clipping,effects")
    parser.add_argument("--effects", default="linears,modules,blocks")
    parser.add_argument("--planted", action="store_true", help="with outliers planted into the activations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    studies = (find_study(model, given.documents, given.length, given.planted) for model in given.models)
    in_pieces(studies, measurements(given), given.folder, given.minutes)


if __name__ == "__main__":
    main()
