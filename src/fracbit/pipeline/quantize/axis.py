"""AdaDim: per linear, blocks along the input or the output, whichever the surrounding unit notices less.

    axis* = argmin_{in, out} || unit(W) - unit(Q_axis(W)) ||^2          (Heo et al. 2023, arXiv:2309.15531, Eq. 1)

The unit is the attention for q, k, v, the MLP for gate and up, the linear itself for o and down (`Family.sublayers`); for a
linear by itself the gram matrix gives the error exactly and nothing is run. All samples count (the released GPTQ variant
compares o and down on the first sample only). Each linear is judged alone, all others float; `in` wins ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fracbit.models.blocks import sublayer_of, weight_of
from fracbit.models.calls import Call
from fracbit.models.family import Family
from fracbit.models.install import set_weight
from fracbit.models.walk import record, replay
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.pipeline.quantize.layer import Method, nearest_like, quantize_layers
from fracbit.pipeline.quantize.work import Block
from fracbit.quantizers.adadim import predicted_axis
from fracbit.records.calibration import AxisChoice
from fracbit.records.scheme import Axis, Scheme

AXES: tuple[Axis, ...] = ("in", "out")


def choose_axes(
    how: AxisChoice,
    family: Family,
    method: Method,
    block: Block,
    group: Sequence[str],
    stats: Stats | None,
) -> dict[str, Scheme]:
    """The schemes of the linears of a group, each with the axis that `how` finds best; without statistics as they are."""
    chosen = {name: block.schemes[name] for name in group}
    if how == "scheme" or stats is None:
        return chosen
    module = block.module
    if how == "predicted":
        weights = {name: weight_of(module.get_submodule(name)) for name in group}
        return {n: replace(s, axis=predicted_axis(weights[n], s, stats.energy)) for n, s in chosen.items()}
    trying = nearest_like(method, method.fill.search) if how == "nearest" else method
    calls: dict[tuple[str, ...], list[Call]] = {}
    for name in group:
        unit = sublayer_of(family, name)
        if unit != (name,) and unit not in calls:
            calls[unit] = record(module, block.hidden, unit)
        losses = [
            _trial(trying, block, name, replace(chosen[name], axis=axis), stats, unit, calls.get(unit))
            for axis in AXES
        ]
        chosen[name] = replace(chosen[name], axis=AXES[losses.index(min(losses))])
    return chosen


def _trial(
    method: Method,
    block: Block,
    name: str,
    scheme: Scheme,
    stats: Stats,
    unit: tuple[str, ...],
    calls: Sequence[Call] | None,
) -> float:
    """Squared error of the unit's output when this linear alone is quantized by `scheme`."""
    module = block.module.get_submodule(name)
    weight, full = weight_of(module).clone(), f"{block.path}.{name}"
    found = quantize_layers(method, {full: weight.float()}, {full: scheme}, stats)[full]
    trial = decode(found.packed)
    if calls is None:
        assert stats.gram is not None
        return float(gram_errors(weight.float() - trial, stats.gram).sum())
    loss = 0.0
    with torch.no_grad():
        for call in calls:
            wanted = replay(block.module, unit, call)
            set_weight(module, trial)
            loss += _squares(replay(block.module, unit, call) - wanted)
            set_weight(module, weight)
    return loss


def _squares(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
