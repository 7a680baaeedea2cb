"""The lens on a model: add errors of known strength and kind to its linears, and measure what each costs in nats.

Gong et al. 2024, arXiv:2403.06408. Weights get one draw per seed. Activations are perturbed at the input of every
linear, with new noise in every forward pass. The result is the change of the mean loss on held-out tokens (the same for
all seeds), with a 95 % interval of its mean by Student's t.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fracbit.errors import RecipeError
from fracbit.models.blocks import weight_of
from fracbit.perturbation import ScalingGroups
from fracbit.pipeline.study.float_model import FloatModel, measure, replaced
from fracbit.pipeline.study.lens_errors import Error, control_for, named_error, noise
from fracbit.records.lens import EVERYWHERE, LensPoint, Target
from fracbit.records.progress import Progress

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


@dataclass
class _Meter:
    """Sums of squares of the errors and of the values they were added to, over one measurement."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, delta: Tensor, x: Tensor) -> None:
        self.error += float(delta.double().square().sum())
        self.signal += float(x.double().square().sum())

    @property
    def intensity(self) -> float:
        return math.sqrt(self.error / self.signal) if self.signal > 0 else 0.0


def probe(
    float_model: FloatModel,
    ids: Tensor,
    error: Error,
    kind: str,
    target: Target = "weights",
    layers: Sequence[str] | None = None,
    name: str = EVERYWHERE,
    seeds: Sequence[int] = tuple(range(SEEDS)),
    base: float | None = None,
) -> LensPoint:
    """Add `error` to the weights or inputs of `layers` (None: every linear) and measure the loss, once per seed.

    `ids` int64 [samples, tokens]; `base`: the loss of the unchanged model, measured if it is not given.
    Raises `RecipeError` when there is no seed.
    """
    if not seeds:
        raise RecipeError("a lens needs at least one seed")
    layers = list(float_model.weights.layers) if layers is None else layers
    base = measure(float_model, ids).nll if base is None else base
    meter = _Meter()
    changes = []
    for seed in seeds:
        with perturbed(float_model, error, target, layers, seed=seed, meter=meter):
            changes.append(measure(float_model, ids).nll - base)
    low, high = interval(changes)
    return LensPoint(
        kind,
        target,
        name,
        intensity=meter.intensity,
        change=statistics.fmean(changes),
        low=low,
        high=high,
        changes=tuple(changes),
    )


@contextmanager
def perturbed(
    float_model: FloatModel,
    error: Error,
    target: Target,
    layers: Sequence[str],
    seed: int,
    meter: _Meter | None = None,
) -> Iterator[None]:
    """A context with errors in the weights of `layers`, in their inputs (new in every forward pass), or in both.

    Weights and hooks are restored afterwards, also after an exception.
    """
    meter = meter or _Meter()
    generator = torch.Generator(float_model.model.device).manual_seed(seed)
    with ExitStack() as stack:
        if target in ("weights", "both"):
            noisy = dict(_noisy_weights(float_model, layers, error, generator=generator, meter=meter))
            stack.enter_context(replaced(float_model, noisy))
        if target in ("activations", "both"):
            for name in layers:
                hook = partial(_perturb_input, error, generator, meter)
                stack.callback(float_model.module(name).register_forward_pre_hook(hook).remove)
        yield


def _noisy_weights(
    float_model: FloatModel, layers: Iterable[str], error: Error, generator: torch.Generator, meter: _Meter
) -> Iterator[tuple[str, Tensor]]:
    for name in layers:
        weight = weight_of(float_model.module(name)).float()  # [out, in]
        delta = error(weight, generator)
        meter.add(delta, weight)
        yield name, weight + delta


def _perturb_input(
    error: Error, generator: torch.Generator, meter: _Meter, _: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    x = args[0]  # [samples, tokens, in]
    delta = error(x.float(), generator)
    meter.add(delta, x)
    return (x + delta.to(x.dtype), *args[1:])


def intensity_curves(
    float_model: FloatModel,
    ids: Tensor,
    kinds: Sequence[str],
    intensities: Sequence[float],
    target: Target = "weights",
    groups: ScalingGroups = "row",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """Loss against relative intensity for each kind: the paper's findings 1 (shape) and 2 (relation to |x|).

    `groups`: the scaling groups in which intensities are equal.
    """
    jobs = [(kind, intensity) for kind in kinds for intensity in intensities]
    errors = [noise(kind, intensity, groups) for kind, intensity in jobs]  # refuses bad ones before any work
    base = measure(float_model, ids).nll
    points = []
    for done, ((kind, _), error) in enumerate(zip(jobs, errors, strict=True)):
        points.append(probe(float_model, ids, error, kind, target=target, seeds=seeds, base=base))
        _show(progress, f"{target}: {kind}", done + 1, len(jobs))
    return points


def unit_effects(
    float_model: FloatModel,
    ids: Tensor,
    units: Mapping[str, Sequence[str]],
    errors: Mapping[str, Error],
    target: Target = "weights",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """Measure every error in every unit alone, then in all units at once (`layers` is `all`).

    `units`: unit name -> its layers, a linear, a block, or all linears of one name (`per_module`).
    """
    base = measure(float_model, ids).nll
    everything = [layer for layers in units.values() for layer in layers]
    places = [*units.items(), (EVERYWHERE, everything)]
    points = []
    for done, (kind, (name, layers)) in enumerate((kind, place) for kind in errors for place in places):
        point = probe(
            float_model,
            ids,
            errors[kind],
            kind,
            target=target,
            layers=layers,
            name=name,
            seeds=seeds,
            base=base,
        )
        points.append(point)
        _show(progress, f"{target}: {kind}", done + 1, len(errors) * len(places))
    return points


def fixed_points(
    float_model: FloatModel,
    ids: Tensor,
    kinds: Sequence[str],
    target: Target = "weights",
    seeds: Sequence[int] = tuple(range(SEEDS)),
    progress: Progress | None = None,
) -> list[LensPoint]:
    """The cost of clipping and schemes (`named_error`), each with that of Gaussian noise of equal strength."""
    base = measure(float_model, ids).nll
    points = []
    for done, kind in enumerate(kinds):
        points.append(
            probe(float_model, ids, named_error(kind, 0.0), kind, target=target, seeds=(0,), base=base)
        )
        label = f"{kind} as gaussian"
        points.append(
            probe(float_model, ids, control_for(kind), label, target=target, seeds=seeds, base=base)
        )
        _show(progress, f"{target}: {kind}", done + 1, len(kinds))
    return points


def per_module(float_model: FloatModel) -> dict[str, list[str]]:
    """Units that are all linears of one name, over the blocks: `self_attn.q_proj` -> the queries of every block."""
    units: dict[str, list[str]] = {}
    for name in float_model.weights.layers:
        inside = name.removeprefix(f"{float_model.weights.blocks}.").partition(".")[2]
        units.setdefault(inside, []).append(name)
    return units


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; for a single value, that value twice."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    degrees = max((d for d in _T95 if d <= len(values) - 1), default=1)
    half = _T95[degrees] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _show(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
