"""One look at a model through the lens: curves over intensity, units one at a time, error against |x|; and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fracbit.errors import OutputError, RecipeError, near_matches
from fracbit.perturbation import error_profile, scheme_error
from fracbit.pipeline.study.float_model import FloatModel, measure
from fracbit.pipeline.study.lens import (
    LensPoint,
    Target,
    fixed_points,
    fragility,
    intensity_curves,
    is_noise,
    named_error,
    per_module,
    unit_effects,
)
from fracbit.pipeline.study.pictures import check_picture, draw_intensity, draw_lines, heat_map, write_csv
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme

PROFILED = {
    "int4 a row": Scheme(block="row"),
    "nf4 a row": Scheme("nf", 4, "row"),
    "power4 a row": Scheme("power", 4, "row"),
}


@dataclass(frozen=True)
class LensReport:
    """What was measured: `base` nats per token on `tokens`, `curves` of the whole model, `effects` of units, `profiles`.

    `profiles`: scheme -> (mean |x| / rms, rms of the error / rms) over the weights of all linears.
    """

    base: float
    tokens: int
    curves: tuple[LensPoint, ...]
    effects: tuple[LensPoint, ...]
    profiles: Mapping[str, tuple[tuple[float, float], ...]]


def make_report(
    subject: FloatModel,
    ids: Tensor,
    kinds: Sequence[str],
    intensities: Sequence[float],
    target: str,
    granularity: str,
    at: float,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> LensReport:
    """Measure curves of `kinds` over `intensities`, and each kind in every unit alone, noise at the intensity `at`.

    `kinds`: noise, clipping and schemes (`named_error`); the last two have an intensity of their own, are no matter of chance,
    and are measured beside Gaussian noise of their strength. `target`: `weights`, `activations` or `both`, which looks at each
    by itself; `granularity`: block, linear or module.
    Raises `RecipeError` for unknown names and intensities that are none.
    """
    units = _units(subject, granularity)
    errors = {kind: named_error(kind, at) for kind in kinds}
    drawn = {kind: error for kind, error in errors.items() if is_noise(kind)}
    fixed = {kind: error for kind, error in errors.items() if not is_noise(kind)}
    if not errors or (drawn and not intensities):
        raise RecipeError("a lens needs at least one kind of error, and noise an intensity")
    base = measure(subject, ids)
    curves: list[LensPoint] = []
    effects: list[LensPoint] = []
    for each in _targets(target):
        curves += intensity_curves(
            subject, ids, list(drawn), intensities, each, seeds=seeds, progress=progress
        )
        curves += fixed_points(subject, ids, list(fixed), each, seeds, progress)
        effects += unit_effects(subject, ids, units, drawn, each, seeds, progress)
        effects += unit_effects(subject, ids, units, fixed, each, (0,), progress)
    return LensReport(base.nll, base.tokens, tuple(curves), tuple(effects), weight_profiles(subject))


def weight_profiles(subject: FloatModel, bins: int = 12) -> dict[str, tuple[tuple[float, float], ...]]:
    """How the rounding error of the model's weights depends on their size, for three data types at 4 bits a row."""
    profiles = {}
    for name, scheme in PROFILED.items():
        lines = []
        for layer in subject.weights.layers:
            weight = subject.weights.read(layer)
            lines.append(
                [point[:2] for point in error_profile(weight, scheme_error(weight, scheme), "row", bins)]
            )
        means = [
            tuple(sum(values) / len(values) for values in zip(*column, strict=True))
            for column in zip(*lines, strict=True)
        ]
        profiles[name] = tuple((size, error) for size, error in means)
    return profiles


def draw_report(report: LensReport, folder: Path) -> None:
    """Pictures of a report, PNG with CSV beside them, into a folder that is made when it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}") from error
    check_picture(folder / "intensity.png")
    draw_intensity(folder / "intensity.png", report.curves)
    write_csv(folder / "effects.csv", [point.row() for point in report.effects])
    cells = [
        (point.layers, f"{point.target} {point.kind}", point.change)
        for point in report.effects
        if point.layers != "all"
    ]
    heat_map(folder / "effects.png", cells, "loss change, nats per token", "unit")
    write_csv(folder / "fragility.csv", fragility(report.effects))
    draw_lines(
        folder / "profile.png",
        report.profiles,
        "|w| / rms",
        "error / rms",
        (True, True),
        "rounding error against |w|",
    )


def _units(subject: FloatModel, granularity: str) -> dict[str, list[str]]:
    if granularity == "module":
        return per_module(subject)
    if granularity == "block":
        return {unit.name: list(unit.shapes) for unit in subject.weights.units("block")}
    if granularity == "linear":
        return {unit.name: list(unit.shapes) for unit in subject.weights.units("linear")}
    raise RecipeError(
        f"granularity {granularity!r}; {near_matches(granularity, ('block', 'linear', 'module'))}"
    )


def _targets(target: str) -> tuple[Target, ...]:
    known: dict[str, tuple[Target, ...]] = {
        "weights": ("weights",),
        "activations": ("activations",),
        "both": ("weights", "activations"),
    }
    if target not in known:
        raise RecipeError(f"target {target!r}; {near_matches(target, known)}")
    return known[target]
