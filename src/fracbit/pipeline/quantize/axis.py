"""AdaDim: per linear, blocks along the input or the output, whichever the surrounding unit notices less.

    axis* = argmin_{in, out} || unit(W) - unit(Q_axis(W)) ||^2          (Heo et al. 2023, arXiv:2309.15531, Eq. 1)

The unit is the attention for q, k, v, the MLP for gate and up, the linear itself for o and down (`Family.units`); for a
linear by itself the gram matrix gives the error exactly and nothing is run. All samples count (the released GPTQ variant
compares o and down on the first sample only). Each linear is judged alone, all others float; `in` wins ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fracbit.models.blocks import unit_of, weight_of
from fracbit.models.calls import Call
from fracbit.models.family import Family
from fracbit.models.install import set_weight
from fracbit.models.walk import Hidden, record, replay
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.quantizers import Quantizer, nearest_of
from fracbit.quantizers.adadim import predicted_axis
from fracbit.records.calibration import AxisChoice
from fracbit.records.scheme import Axis, Scheme

AXES: tuple[Axis, ...] = ("in", "out")


def choose_axes(
    how: AxisChoice,
    family: Family,
    block: nn.Module,
    hidden: Hidden,
    group: Sequence[str],
    schemes: Mapping[str, Scheme],
    stats: Stats | None,
    fill: Quantizer,
) -> dict[str, Scheme]:
    """The schemes of the linears of a group, each with the axis that `how` finds best; without statistics as they are."""
    chosen = {name: schemes[name] for name in group}
    if how == "scheme" or stats is None:
        return chosen
    if how == "predicted":
        weights = {name: weight_of(block.get_submodule(name)) for name in group}
        return {n: replace(s, axis=predicted_axis(weights[n], s, stats.energy)) for n, s in chosen.items()}
    method = nearest_of(fill, getattr(fill, "search", False)) if how == "nearest" else fill
    calls: dict[tuple[str, ...], list[Call]] = {}
    for name in group:
        unit = unit_of(family, name)
        if unit != (name,) and unit not in calls:
            calls[unit] = record(block, hidden, unit)
        losses = [
            _trial(block, name, replace(chosen[name], axis=axis), stats, method, unit, calls.get(unit))
            for axis in AXES
        ]
        chosen[name] = replace(chosen[name], axis=AXES[losses.index(min(losses))])
    return chosen


def _trial(
    block: nn.Module,
    name: str,
    scheme: Scheme,
    stats: Stats,
    method: Quantizer,
    unit: tuple[str, ...],
    calls: Sequence[Call] | None,
) -> float:
    """Squared error of the unit's output when this linear alone is quantized by `scheme`."""
    module = block.get_submodule(name)
    weight = weight_of(module).clone()
    trial = decode(method(weight.float(), scheme, stats).packed)
    if calls is None:
        assert stats.gram is not None
        return float(gram_errors(weight.float() - trial, stats.gram).sum())
    loss = 0.0
    with torch.no_grad():
        for call in calls:
            wanted = replay(block, unit, call)
            set_weight(module, trial)
            loss += _squares(replay(block, unit, call) - wanted)
            set_weight(module, weight)
    return loss


def _squares(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
