"""Measure everything that docs/lens.md reports, into CSV files: python bench/lens/measure.py MODEL [MODEL...].

MODEL is `bundled`, a model of FRACBIT_SHARED, or a folder. What a CSV file holds of a model already is not measured again, so
that a long measurement can be done in pieces.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fracbit.bundled import bundled_model
from fracbit.perturbation import PERTURBATIONS, best_exponent, error_profile, scheme_error
from fracbit.pipeline.study.float_model import FloatModel, load_float, measure, replaced
from fracbit.pipeline.study.lens import (
    Error,
    LensPoint,
    clip,
    intensity_curves,
    noise,
    noise_like,
    noise_like_clipping,
    per_module,
    perturbed,
    plant_outliers,
    probe,
    rounding,
    unit_effects,
)
from fracbit.pipeline.study.texts import samples_of
from fracbit.records.allocation import read_level
from fracbit.records.scheme import Scheme

UNFINISHED = 75
SHARED = Path(os.environ.get("FRACBIT_SHARED", "../shared"))
SEEDS = (0, 1, 2, 3, 4)
TYPES = ("int", "nf", "power:1/3", "power:1/2", "searched", "kmeans")
AT = 0.15


@dataclass(frozen=True)
class Study:
    """A model, its text and the folder of the CSV files; `name` ends in ` planted` when it has outliers."""

    name: str
    subject: FloatModel
    ids: Tensor
    out: Path

    def has(self, file: str, **key: object) -> bool:
        path = self.out / file
        if not path.exists():
            return False
        with path.open(newline="") as text:
            wanted = {"model": self.name, **key}
            return any(all(row[k] == str(v) for k, v in wanted.items()) for row in csv.DictReader(text))

    def add(self, file: str, rows: Sequence[dict[str, object]]) -> None:
        path = self.out / file
        fresh = not path.exists()
        with path.open("a", newline="") as text:
            writer = csv.DictWriter(text, ["model", *rows[0]])
            if fresh:
                writer.writeheader()
            writer.writerows({"model": self.name, **row} for row in rows)

    def points(self, file: str, some: list[LensPoint]) -> None:
        short = ("intensity", "change", "low", "high")
        rows = [point.row() for point in some]
        self.add(file, [{**row, **{key: f"{row[key]:.6f}" for key in short}} for row in rows])


def find_study(model: str, documents: int, length: int, out: Path, planted: bool) -> Study:
    shared = SHARED / "models" / Path(model).name
    tales = shared.is_dir() and not Path(model).is_dir()
    folder = bundled_model() if model == "bundled" else shared if tales else Path(model)
    subject = load_float(folder)
    text = "bundled:held-out"
    if tales:
        text = f"{SHARED / 'data'}/tales-evaluation.u16?length=512&keep={length}"
    ids = samples_of(text, str(folder), subject, documents, length)
    if planted:
        plant_outliers(subject, 50.0, 2)
    name = "bundled" if model == "bundled" else folder.name
    return Study(f"{name} planted" if planted else name, subject, ids, out)


def measure_float(study: Study) -> None:
    if not study.has("models.csv"):
        found = measure(study.subject, study.ids)
        study.add("models.csv", [{"float nll": f"{found.nll:.5f}", "tokens": found.tokens}])


def measure_curve(study: Study, target: str, kind: str, intensities: Sequence[float]) -> None:
    if not study.has("intensity.csv", target=target, kind=kind):
        found = intensity_curves(study.subject, study.ids, [kind], intensities, target, seeds=SEEDS)  # type: ignore[arg-type]
        study.points("intensity.csv", found)


def measure_scheme(study: Study, label: str) -> None:
    """The error a scheme really makes beside noise of its strength in every block."""
    if study.has("schemes.csv", kind=f"{label} itself"):
        return
    base = measure(study.subject, study.ids).nll
    scheme = read_level(label)
    assert scheme is not None
    found = [probe(study.subject, study.ids, rounding(scheme), f"{label} itself", seeds=(0,), base=base)]
    found += [
        probe(
            study.subject, study.ids, noise_like(kind, scheme), f"{label} as {kind}", seeds=SEEDS, base=base
        )
        for kind in ("gaussian", "uniform", "rademacher", "growing", "shrinking")
    ]
    study.points("schemes.csv", found)


def measure_clipping(study: Study, target: str) -> None:
    if study.has("clipping.csv", target=target):
        return
    base = measure(study.subject, study.ids).nll
    look = partial(probe, study.subject, study.ids, target=target, base=base)
    found = []
    for share in (0.0001, 0.001, 0.01):
        each = f"{100 * share:g} %"
        clipped = look(clip(share, "tensor"), f"clip {each}", seeds=(0,))
        everywhere = noise("gaussian", max(clipped.intensity, 1e-6), "tensor")
        found += [
            clipped,
            look(noise_like_clipping(share, "tensor"), f"noise there {each}", seeds=SEEDS),
            look(everywhere, f"noise everywhere {each}", seeds=SEEDS),
        ]
    study.points("clipping.csv", found)


def measure_effects(study: Study, units: str, target: str, kinds: Sequence[str]) -> None:
    """Errors in single linears, in one module over all blocks, or in whole blocks; real schemes for the weights only."""
    named = {
        "linears": {layer: [layer] for layer in study.subject.weights.layers},
        "modules": per_module(study.subject),
        "blocks": {unit.name: list(unit.shapes) for unit in study.subject.weights.units()},
    }[units]
    for kind in kinds:
        if study.has(f"{units}.csv", target=target, kind=kind):
            continue
        level = read_level(kind) if "/" in kind else None
        error: Error = noise(kind, AT) if level is None else rounding(level)
        seeds = SEEDS if level is None else (0,)
        found = unit_effects(study.subject, study.ids, named, {kind: error}, target, seeds)  # type: ignore[arg-type]
        study.points(f"{units}.csv", found)


def searched(scheme: Scheme) -> Error:
    """Rounding to the power type of the exponent that leaves the least error in the tensor at hand."""
    return lambda x, generator: scheme_error(x, best_exponent(x.reshape(-1, x.shape[-1]), scheme))


def typed(dtype: str, bits: int, block: int | str) -> Error:
    plain = Scheme("int" if dtype == "searched" else dtype, bits, block)
    return searched(plain) if dtype == "searched" else rounding(plain)


def measure_w4(study: Study) -> None:
    """W4 by type and granularity of the scales."""
    if study.has("nonuniform.csv", setting="W4"):
        return
    base = measure(study.subject, study.ids).nll
    rows: list[dict[str, object]] = []
    for block in ("tensor", "row", 64):
        for dtype in TYPES:
            noisy, used = {}, []
            for layer in study.subject.weights.layers:
                weight = study.subject.weights.read(layer)
                plain = Scheme("int" if dtype == "searched" else dtype, 4, block)
                scheme = best_exponent(weight, plain) if dtype == "searched" else plain
                noisy[layer] = weight + scheme_error(weight, scheme)
                used.append(scheme.dtype.removeprefix("power:"))
            with replaced(study.subject, noisy):
                change = measure(study.subject, study.ids).nll - base
            exponents = " ".join(sorted(set(used))) if dtype == "searched" else ""
            rows.append(
                {"setting": "W4", "granularity": str(block), "type": dtype, "change": f"{change:.5f}", "used": exponents}
            )  # fmt: skip
    study.add("nonuniform.csv", rows)


def measure_activations(study: Study, setting: str) -> None:
    """Weights per row and activations per tensor, per token and per block of 64 of a token, both of one type."""
    if study.has("nonuniform.csv", setting=setting):
        return
    base = measure(study.subject, study.ids).nll
    everything = list(study.subject.weights.layers)
    rows: list[dict[str, object]] = []
    for block, name in (("tensor", "tensor"), ("row", "token"), (64, "block 64")):
        for dtype in TYPES:
            with ExitStack() as stack:
                for target, bits, size in (
                    ("weights", int(setting[1]), "row"),
                    ("activations", int(setting[3]), block),
                ):
                    error = typed(dtype, bits, size)
                    stack.enter_context(perturbed(study.subject, error, target, everything, 0))  # type: ignore[arg-type]
                change = measure(study.subject, study.ids).nll - base
            rows.append(
                {"setting": setting, "granularity": f"activations per {name}", "type": dtype, "change": f"{change:.5f}",
                 "used": ""}
            )  # fmt: skip
    study.add("nonuniform.csv", rows)


def measure_profiles(study: Study) -> None:
    """Error against |x| of the weights of all linears, W4 per row."""
    if study.has("error-profiles.csv"):
        return
    rows: list[dict[str, object]] = []
    for dtype in ("int", "nf", "power:1/3", "power:1/2", "kmeans"):
        sizes, errors = [], []
        for layer in study.subject.weights.layers:
            weight = study.subject.weights.read(layer)
            profile = error_profile(weight, scheme_error(weight, Scheme(dtype, 4, "row")), "row", 12)
            sizes.append([size for size, _, _ in profile])
            errors.append([error for _, error, _ in profile])
        rows += [
            {"type": dtype, "size": f"{size:.5f}", "error": f"{error:.5f}"}
            for size, error in zip(np.mean(sizes, 0), np.mean(errors, 0), strict=True)
        ]
    study.add("error-profiles.csv", rows)


Jobs = Iterator[tuple[str, Callable[[], None]]]


def jobs_of(study: Study, given: argparse.Namespace) -> Jobs:
    """What there is to measure of a model, each by its name; what is measured already takes no time."""
    planted = study.name.endswith("planted")
    yield "float", partial(measure_float, study)
    if "nonuniform" in given.parts:
        yield "W4", partial(measure_w4, study)
        for setting in ("W8A8", "W4A8", "W8A4"):
            yield setting, partial(measure_activations, study, setting)
        yield "profiles", partial(measure_profiles, study)
    if "clipping" in given.parts:
        for target in ("weights", "activations"):
            yield f"clipping {target}", partial(measure_clipping, study, target)
    if "schemes" in given.parts and not planted:
        for label in ("int3z/64", "nf3/64", "int4z/row"):
            yield label, partial(measure_scheme, study, label)
    if "curves" in given.parts and not planted:
        intensities = [float(x) for x in given.intensities.split(",")]
        for target, kind in itertools.product(("weights", "activations"), PERTURBATIONS):
            yield f"{target} {kind}", partial(measure_curve, study, target, kind, intensities)
    if "effects" in given.parts and not planted:
        yield from effect_jobs(study, given.effects.split(","))


def effect_jobs(study: Study, some: Sequence[str]) -> Jobs:
    """Units one at a time: noise in weights and in activations, real schemes in the weights."""
    for units, target in itertools.product(some, ("weights", "activations")):
        noises = ["gaussian"] if units == "linears" else ["gaussian", "growing", "shrinking"]
        real = ["int4z/64", "int3z/64", "int2z/64"] if target == "weights" else []
        for kind in noises + real:
            yield f"{units} {target} {kind}", partial(measure_effects, study, units, target, [kind])


def main() -> None:
    """Measure what is asked for and not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/lens"))
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--intensities", default="0.03,0.06,0.12,0.25")
    parser.add_argument("--parts", default="nonuniform,curves,schemes,clipping,effects")
    parser.add_argument("--effects", default="linears,modules,blocks")
    parser.add_argument("--planted", action="store_true", help="with outliers planted into the activations")
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
        study = find_study(model, given.documents, given.length, given.out, given.planted)
        for name, job in jobs_of(study, given):
            if time.monotonic() - started > 60 * given.minutes:
                raise SystemExit(UNFINISHED)
            begun = time.monotonic()
            job()
            if time.monotonic() - begun > 1:
                print(f"{study.name} {name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
