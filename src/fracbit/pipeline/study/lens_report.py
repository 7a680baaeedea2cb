"""The lens report of a model: curves over intensity, one unit at a time, and error against |x|."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.opened import open_float
from fracbit.errors import RecipeError, check_choice
from fracbit.perturbation import error_profile, scheme_error
from fracbit.pipeline.study.float_model import FloatModel, measure
from fracbit.pipeline.study.lens import SEEDS, fixed_points, intensity_curves, per_module, unit_effects
from fracbit.pipeline.study.lens_errors import Error, is_noise, named_error
from fracbit.pipeline.study.planted import plant_outliers
from fracbit.pipeline.study.study import Study
from fracbit.pipeline.study.texts import seen_by
from fracbit.records.lens import GRANULARITIES, TARGETS, LensPoint, LensReport, Target
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.spending import LENGTH
from fracbit.records.text_source import check_source

SAMPLES = 16
AT = 0.1
PROFILED = {
    "int4 a row": Scheme(block="row"),
    "nf4 a row": Scheme("nf", 4, "row"),
    "power4 a row": Scheme("power", 4, "row"),
}


def lens_report(
    model: str | Path,
    text: str,
    *,
    kinds: Sequence[str],
    intensities: Sequence[float],
    target: str = "both",
    granularity: str = "block",
    at: float = AT,
    seeds: int = SEEDS,
    plant: float | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LensReport:
    """Measure what errors cost a float model (folder or hub id): curves of `kinds`, and each kind in every unit alone.

    - `kinds`: noise, clipping and schemes (`named_error`). The last two have a fixed intensity and are not random; they
      are measured together with Gaussian noise of equal strength.
    - `intensities`: of the noise in the curves; `at`: of the noise in the units; `seeds`: draws of each.
    - `target`: `weights`, `activations` or `both` (each by itself); `granularity`: block, linear or module.
    - `plant`: first plant activation outliers of this factor; the model's function does not change.
    - `trust_remote_code`: run the model's own code.

    Raises `RecipeError` for unknown names, bad intensities, too few seeds; `SourceError`, `DataError`.
    """
    errors = {kind: named_error(kind, at) for kind in kinds}
    _check(errors, intensities, target=target, granularity=granularity, seeds=seeds)
    check_source(text)
    study = Study(open_float(model, trust_remote_code=trust_remote_code))
    float_model = study.float_model
    planted = 0 if plant is None else plant_outliers(float_model, plant)
    if plant is not None and planted == 0:
        raise RecipeError(
            f"{model} has no norm that only linears read, so outliers would change its outputs; leave --plant out"
        )
    drawn = study.held_out(text, samples, length)
    base = measure(float_model, drawn.ids)
    curves: list[LensPoint] = []
    effects: list[LensPoint] = []
    for each in TARGETS[target]:
        look = _Look(float_model, drawn.ids, errors, target=each, seeds=range(seeds), progress=progress)
        curves += look.curves(intensities)
        effects += look.effects(_units(float_model, granularity))
    return LensReport(
        float_model.weights.fingerprint,
        base=base.nll,
        tokens=base.tokens,
        curves=tuple(curves),
        effects=tuple(effects),
        profiles=weight_profiles(float_model),
        planted=planted,
        protocol={"intensity": at, "seeds": seeds, "tokens": drawn.ids.numel(), "text": seen_by(drawn)},
    )


@dataclass(frozen=True, eq=False)
class _Look:
    """Errors in one target of a model, random ones once per seed; `ids` int64 [samples, tokens]."""

    float_model: FloatModel
    ids: Tensor
    errors: Mapping[str, Error]
    target: Target
    seeds: Sequence[int]
    progress: Progress | None

    def curves(self, intensities: Sequence[float]) -> list[LensPoint]:
        """The curves of the whole model: noise over intensities, and other errors with noise of equal strength."""
        noisy, fixed = self._kinds()
        options: Any = {"target": self.target, "seeds": self.seeds, "progress": self.progress}
        drawn = intensity_curves(self.float_model, self.ids, list(noisy), intensities, **options)
        return drawn + fixed_points(self.float_model, self.ids, list(fixed), **options)

    def effects(self, units: Mapping[str, Sequence[str]]) -> list[LensPoint]:
        """The effects of errors in every unit alone, and in all units at once."""
        noisy, fixed = self._kinds()
        options: Any = {"target": self.target, "progress": self.progress}
        drawn = unit_effects(self.float_model, self.ids, units, noisy, seeds=self.seeds, **options)
        return drawn + unit_effects(self.float_model, self.ids, units, fixed, seeds=(0,), **options)

    def _kinds(self) -> tuple[dict[str, Error], dict[str, Error]]:
        noisy = {kind: error for kind, error in self.errors.items() if is_noise(kind)}
        return noisy, {kind: error for kind, error in self.errors.items() if kind not in noisy}


def weight_profiles(float_model: FloatModel, bins: int = 12) -> dict[str, tuple[tuple[float, float], ...]]:
    """How the rounding error of the weights depends on their size, for three 4-bit types with one scale per row."""
    profiles = {}
    for name, scheme in PROFILED.items():
        lines = []
        for layer in float_model.weights.layers:
            weight = float_model.weights.read(layer)  # [out, in]
            lines.append(
                [point[:2] for point in error_profile(weight, scheme_error(weight, scheme), "row", bins)]
            )
        means = [
            tuple(sum(values) / len(values) for values in zip(*column, strict=True))
            for column in zip(*lines, strict=True)
        ]
        profiles[name] = tuple((size, error) for size, error in means)
    return profiles


def _check(
    errors: Mapping[str, Error], intensities: Sequence[float], *, target: str, granularity: str, seeds: int
) -> None:
    if not errors or (any(map(is_noise, errors)) and not intensities):
        raise RecipeError("a lens needs at least one kind of error, and noise needs an intensity")
    if seeds < SEEDS:
        raise RecipeError(f"{seeds} seeds are too few for noise; take at least {SEEDS}")
    check_choice("target", target, tuple(TARGETS))
    check_choice("granularity", granularity, GRANULARITIES)


def _units(float_model: FloatModel, granularity: str) -> dict[str, list[str]]:
    if granularity == "module":
        return per_module(float_model)
    units = float_model.weights.units("block" if granularity == "block" else "linear")
    return {unit.name: list(unit.shapes) for unit in units}
