"""The lens over a model: put errors of known strength and character into its linears and see what each costs in nats.

Gong et al. 2024, arXiv:2403.06408. Weights get one draw a seed; activations are perturbed at the input of every linear with
fresh noise in every forward. Loss is the change of the mean loss on held-out tokens against the untouched model, over seeds
(the same text for all), with a 95 % interval of its mean by Student's t.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fracbit.errors import RecipeError, SchemeError, near_matches
from fracbit.models.blocks import blocks, gain_of, norms, weight_of
from fracbit.models.install import set_weight
from fracbit.numerics.datatypes import check_datatype
from fracbit.perturbation import (
    PERTURBATIONS,
    UnitOf,
    check_intensity,
    check_share,
    clipping,
    noise_on,
    perturb,
    perturb_like,
    perturbation,
    scheme_error,
)
from fracbit.pipeline.study.float_model import FloatModel, measure, replaced
from fracbit.records.allocation import read_level
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores

Target: TypeAlias = Literal["weights", "activations", "both"]
Error: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""What to add to a tensor: x and a generator in, delta of the same shape out."""

SEEDS = 5
_T95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    14: 2.145,
    19: 2.093,
}


@dataclass(frozen=True)
class LensPoint:
    """What one error cost.

    `kind` names the error, `target` what it was added to, `layers` where (`all`, or a unit's name); `intensity` is |delta|/|x|
    as measured over all perturbed tensors; `change` is the mean over seeds of the loss change in nats per token, `low` and
    `high` its 95 % interval, `changes` the seeds one by one.
    """

    kind: str
    target: str
    layers: str
    intensity: float
    change: float
    low: float
    high: float
    changes: tuple[float, ...]

    def row(self) -> dict[str, str | float | int]:
        """The point as a line of a table."""
        return {
            "kind": self.kind, "target": self.target, "layers": self.layers, "intensity": self.intensity,
            "change": self.change, "low": self.low, "high": self.high, "seeds": len(self.changes),
        }  # fmt: skip


@dataclass
class _Meter:
    """Energy of the errors and of what they were added to, over one measurement."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, delta: Tensor, x: Tensor) -> None:
        self.error += float(delta.double().square().sum())
        self.signal += float(x.double().square().sum())

    @property
    def intensity(self) -> float:
        return math.sqrt(self.error / self.signal) if self.signal > 0 else 0.0


def probe(
    subject: FloatModel,
    ids: Tensor,
    error: Error,
    kind: str,
    target: Target = "weights",
    layers: Sequence[str] | None = None,
    name: str = "all",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    base: float | None = None,
) -> LensPoint:
    """Add `error` to the weights or inputs of `layers` (None: every linear) and measure the loss, once a seed.

    `base`: the untouched model's loss, measured when it is not given. Raises `RecipeError` when there is no seed.
    """
    if not seeds:
        raise RecipeError("a lens needs at least one seed")
    layers = list(subject.weights.layers) if layers is None else layers
    base = measure(subject, ids).nll if base is None else base
    meter = _Meter()
    changes = []
    for seed in seeds:
        with perturbed(subject, error, target, layers, seed, meter):
            changes.append(measure(subject, ids).nll - base)
    low, high = interval(changes)
    return LensPoint(
        kind, target, name, meter.intensity, statistics.fmean(changes), low, high, tuple(changes)
    )


@contextmanager
def perturbed(
    subject: FloatModel,
    error: Error,
    target: Target,
    layers: Sequence[str],
    seed: int,
    meter: _Meter | None = None,
) -> Iterator[None]:
    """The model with errors in the weights of `layers`, in their inputs (fresh in every forward), or in both.

    Weights and hooks are as before on the way out, also when something raises.
    """
    meter = meter or _Meter()
    generator = torch.Generator(subject.model.device).manual_seed(seed)
    with ExitStack() as stack:
        if target in ("weights", "both"):
            stack.enter_context(
                replaced(subject, dict(_noisy_weights(subject, layers, error, generator, meter)))
            )
        if target in ("activations", "both"):
            for name in layers:
                hook = partial(_perturb_input, error, generator, meter)
                stack.callback(subject.module(name).register_forward_pre_hook(hook).remove)
        yield


def _noisy_weights(
    subject: FloatModel, layers: Iterable[str], error: Error, generator: torch.Generator, meter: _Meter
) -> Iterator[tuple[str, Tensor]]:
    for name in layers:
        weight = weight_of(subject.module(name)).float()
        delta = error(weight, generator)
        meter.add(delta, weight)
        yield name, weight + delta


def _perturb_input(
    error: Error, generator: torch.Generator, meter: _Meter, _: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    x = args[0]
    delta = error(x.float(), generator)
    meter.add(delta, x)
    return (x + delta.to(x.dtype), *args[1:])


def noise(kind: str, intensity: float, unit: UnitOf = "row") -> Error:
    """An error of the table `lens.PERTURBATIONS` of this relative intensity in every scaling unit. Raises `RecipeError`."""
    check_intensity(intensity)
    perturbation(kind)
    return lambda x, generator: perturb(x, kind, intensity, unit, generator)


def rounding(scheme: Scheme) -> Error:
    """The error that round-to-nearest under `scheme` really makes; no chance in it."""
    return lambda x, generator: scheme_error(x, scheme)


def noise_like(kind: str, scheme: Scheme, unit: UnitOf | None = None) -> Error:
    """Noise that has, in every scaling unit, the L2 norm of the error that `scheme` makes there."""
    perturbation(kind)
    return lambda x, generator: perturb_like(
        x, scheme_error(x, scheme), kind, unit or _unit(scheme, x), generator
    )


def clip(share: float, unit: UnitOf = "row") -> Error:
    """Clipping of the largest `share` of |x| in every unit."""
    return lambda x, generator: clipping(x, share, unit)


def noise_like_clipping(share: float, unit: UnitOf = "row") -> Error:
    """The control for `clip`: Gaussian noise on the elements that it moves, of the norm that it moves them by."""
    return lambda x, generator: noise_on(x, clipping(x, share, unit), generator)


def is_noise(kind: str) -> bool:
    """Whether a kind of error is drawn at an intensity that one chooses; the others are what they are."""
    return kind in PERTURBATIONS


def named_error(kind: str, intensity: float) -> Error:
    """The error that a word stands for: noise of the table at this intensity, clipping such as `clip:0.001` of the largest in
    every tensor, or what a scheme such as `int3z/64` really does. Raises `RecipeError` for anything else.
    """
    if is_noise(kind):
        return noise(kind, intensity)
    return _share_or_scheme(kind, clip, rounding)


def control_for(kind: str) -> Error:
    """Gaussian noise as strong as clipping or a scheme: on the elements that are clipped, or in every block of the scheme."""
    return _share_or_scheme(kind, noise_like_clipping, partial(noise_like, "gaussian"))


def _share_or_scheme(
    kind: str, clipped: Callable[[float, UnitOf], Error], scheme: Callable[[Scheme], Error]
) -> Error:
    if kind.startswith("clip:"):
        try:
            share = float(kind.removeprefix("clip:"))
        except ValueError:
            share = math.nan
        check_share(share)
        return clipped(share, "tensor")
    try:
        level = read_level(kind)
    except SchemeError as error:
        raise RecipeError(
            f"unknown error {kind!r}; {near_matches(kind, PERTURBATIONS)}; or clip:0.001, or a scheme such as int3z/64"
        ) from error
    if level is None:
        raise RecipeError("float makes no error; name noise, clip:0.001 or a scheme such as int3z/64")
    check_datatype(level)
    return scheme(level)


def _unit(scheme: Scheme, x: Tensor) -> UnitOf:
    """A scheme's blocks, for weights; activations [samples, tokens, in] have them inside a token only when they divide."""
    return scheme if x.dim() == 2 else "row"


def intensity_curves(
    subject: FloatModel,
    ids: Tensor,
    kinds: Sequence[str],
    intensities: Sequence[float],
    target: Target = "weights",
    unit: UnitOf = "row",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """Loss against relative intensity for each kind: the paper's findings 1 (shape) and 2 (relation to |x|)."""
    base = measure(subject, ids).nll
    jobs = [(kind, intensity) for kind in kinds for intensity in intensities]
    errors = [
        noise(kind, intensity, unit) for kind, intensity in jobs
    ]  # all arguments are checked before any work
    points = []
    for done, ((kind, _), error) in enumerate(zip(jobs, errors, strict=True)):
        points.append(probe(subject, ids, error, kind, target, seeds=seeds, base=base))
        _show(progress, f"{target}: {kind}", done + 1, len(jobs))
    return points


def unit_effects(
    subject: FloatModel,
    ids: Tensor,
    units: Mapping[str, Sequence[str]],
    errors: Mapping[str, Error],
    target: Target = "weights",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """Every error in every unit alone, then (`layers` is `all`) in all of them at once.

    `units`: unit name -> its layers, a linear, a block, or all linears of one name (per module).
    """
    base = measure(subject, ids).nll
    everything = [layer for layers in units.values() for layer in layers]
    places = [*units.items(), ("all", everything)]
    points = []
    for done, (kind, (name, layers)) in enumerate((kind, place) for kind in errors for place in places):
        points.append(probe(subject, ids, errors[kind], kind, target, layers, name, seeds, base))
        _show(progress, f"{target}: {kind}", done + 1, len(errors) * len(places))
    return points


@dataclass(frozen=True)
class Additivity:
    """Whether the losses of single units add up: `parts` is their sum, `whole` the loss of all at once, in nats per token."""

    kind: str
    target: str
    parts: float
    whole: float

    @property
    def ratio(self) -> float:
        """The whole over its parts: above 1 the errors amplify each other; NaN when the parts cost nothing."""
        return self.whole / self.parts if self.parts else math.nan


def fixed_points(
    subject: FloatModel,
    ids: Tensor,
    kinds: Sequence[str],
    target: Target = "weights",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """What clipping and schemes cost (`named_error`), each beside Gaussian noise of its strength: is it shape or intensity."""
    base = measure(subject, ids).nll
    points = []
    for done, kind in enumerate(kinds):
        points.append(probe(subject, ids, named_error(kind, 0.0), kind, target, seeds=(0,), base=base))
        label = f"{kind} as gaussian"
        points.append(probe(subject, ids, control_for(kind), label, target, seeds=seeds, base=base))
        _show(progress, f"{target}: {kind}", done + 1, len(kinds))
    return points


def additivity(points: Sequence[LensPoint]) -> list[Additivity]:
    """The check for every kind and target of `unit_effects`."""
    found = []
    for kind, target in dict.fromkeys((point.kind, point.target) for point in points):
        here = [point for point in points if (point.kind, point.target) == (kind, target)]
        parts = sum(point.change for point in here if point.layers != "all")
        found += [Additivity(kind, target, parts, point.change) for point in here if point.layers == "all"]
    return found


def fragility(points: Sequence[LensPoint]) -> list[dict[str, str | float]]:
    """A line for each unit, the most fragile first: what each error costs it, and to which it is most sensitive.

    Sensitivity is loss change over squared relative intensity: what a unit would lose to an error as large as itself if the
    loss were quadratic; it makes errors of unequal strength comparable.
    """
    lines: list[dict[str, str | float]] = []
    for unit in dict.fromkeys(point.layers for point in points if point.layers != "all"):
        here = {
            f"{point.target} {point.kind}": sensitivity(point) for point in points if point.layers == unit
        }
        worst = max(here, key=lambda kind: here[kind])
        lines.append({"unit": unit, "most fragile to": worst, "sensitivity": here[worst], **here})
    return sorted(lines, key=lambda line: -float(line["sensitivity"]))


def sensitivity(point: LensPoint) -> float:
    """Loss change over squared relative intensity, nats; 0 where nothing was perturbed."""
    return point.change / point.intensity**2 if point.intensity > 0 else 0.0


def sensitivity_scores(
    subject: FloatModel, points: Sequence[LensPoint], kind: str, protocol: Mapping[str, Any]
) -> Scores:
    """The sensitivities of one kind as scores for an allocation; below 0 (noise) they count as 0."""
    values = {
        point.layers: max(sensitivity(point), 0.0)
        for point in points
        if point.kind == kind and point.layers != "all"
    }
    return Scores(values, f"lens:{kind}", subject.weights.model, "sensitivity", protocol)


def per_module(subject: FloatModel) -> dict[str, list[str]]:
    """Units that are all linears of one name, over the blocks: `self_attn.q_proj` -> the queries of every block."""
    units: dict[str, list[str]] = {}
    for name in subject.weights.layers:
        inside = name.removeprefix(f"{subject.weights.blocks}.").partition(".")[2]
        units.setdefault(inside, []).append(name)
    return units


def plant_outliers(subject: FloatModel, factor: float = 50.0, channels: int = 2, seed: int = 0) -> int:
    """Plant activation outliers without changing the model: scale some norm gains up and the columns that read them down.

    `channels` of every norm that only linears read are scaled by `factor`, in place. Returns how many norms were changed.
    A trained small model has few outliers; this gives it those of a large one.
    """
    check_intensity(factor)
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for _, block in blocks(subject.model, subject.family):
        for norm in norms(block, subject.family):
            gain = gain_of(block, norm.name)
            if not norm.exclusive or not norm.readers or gain is None:
                continue
            chosen = torch.randperm(len(gain), generator=generator)[:channels]
            module = block.get_submodule(norm.name)
            with torch.no_grad():
                offset = subject.family.gain_offset
                gain[chosen] = (gain[chosen] + offset) * factor - offset
                bias = dict(module.named_parameters(recurse=False)).get("bias")
                if bias is not None:
                    bias[chosen] *= factor
            for reader in norm.readers:
                weight = weight_of(block.get_submodule(reader)).clone()
                weight[:, chosen] /= factor
                set_weight(block.get_submodule(reader), weight)
            changed += 1
    return changed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; the mean itself twice for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    degrees = max((d for d in _T95 if d <= len(values) - 1), default=1)
    half = _T95[degrees] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _show(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
