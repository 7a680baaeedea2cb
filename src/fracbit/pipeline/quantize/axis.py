"""AdaDim: for each linear, blocks along the input or the output, whichever changes the output of its unit less.

    axis* = argmin_{in, out} || unit(W) - unit(Q_axis(W)) ||^2          (Heo et al. 2023, arXiv:2309.15531, Eq. 1)

The unit is the attention for q, k and v, the MLP for gate and up, and the linear itself for o and down
(`Family.sublayers`). For a single linear the Gram matrix gives the exact error, and nothing is run. All samples count;
the released GPTQ variant compares o and down on the first sample only. Each linear is tested alone while the others
stay float; `in` wins ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.models.blocks import sublayer_of, weight_of
from fracbit.models.calls import Call
from fracbit.models.install import set_weight
from fracbit.models.walk import record, replay
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.pipeline.quantize.layer import Method, nearest_like, quantize_layers
from fracbit.pipeline.quantize.work import Block, Work
from fracbit.quantizers.adadim import predicted_axis
from fracbit.records.scheme import Axis, Scheme

AXES: tuple[Axis, ...] = ("in", "out")


@dataclass(frozen=True, eq=False)
class Inside:
    """Where a linear is tried: the statistics of its inputs, its sublayer, and the recorded calls of that.

    `calls` is None where the linear is its own sublayer: the Gram matrix says the same.
    """

    stats: Stats
    unit: tuple[str, ...]
    calls: Sequence[Call] | None


def choose_axes(work: Work, block: Block, group: Sequence[str], stats: Stats | None) -> dict[str, Scheme]:
    """The schemes of the linears of a group, each with the axis that the recipe's way finds best.

    They are unchanged without statistics, and where the recipe leaves the axis to the scheme.
    """
    how, module = work.calibration.axis, block.module
    chosen = {name: block.schemes[name] for name in group}
    if how == "scheme" or stats is None:
        return chosen
    if how == "predicted":
        weights = {name: weight_of(module.get_submodule(name)) for name in group}
        return {n: replace(s, axis=predicted_axis(weights[n], s, stats.energy)) for n, s in chosen.items()}
    # Both axes are tried, one linear after the other, on what its sublayer gives.
    trying = nearest_like(work.method, work.method.fill.search) if how == "nearest" else work.method
    calls: dict[tuple[str, ...], list[Call]] = {}
    for name in group:
        unit = sublayer_of(work.opened.family, name)
        if unit != (name,) and unit not in calls:
            calls[unit] = record(module, block.hidden, unit)
        inside = Inside(stats, unit, calls.get(unit))
        losses = [
            _trial(trying, block, name, replace(chosen[name], axis=axis), inside=inside) for axis in AXES
        ]
        chosen[name] = replace(chosen[name], axis=AXES[losses.index(min(losses))])
    return chosen


def _trial(method: Method, block: Block, name: str, scheme: Scheme, *, inside: Inside) -> float:
    """Squared error of the unit's output when this linear alone is quantized by `scheme`."""
    module = block.module.get_submodule(name)
    weight, full = weight_of(module).clone(), f"{block.path}.{name}"
    found = quantize_layers(method, {full: weight.float()}, {full: scheme}, inside.stats)[full]
    trial = decode(found.packed)  # [out, in]
    if inside.calls is None:
        assert inside.stats.gram is not None
        return float(gram_errors(weight.float() - trial, inside.stats.gram).sum())
    loss = 0.0
    with torch.no_grad():
        for call in inside.calls:
            wanted = replay(block.module, inside.unit, call)
            set_weight(module, trial)
            loss += _squares(replay(block.module, inside.unit, call) - wanted)
            set_weight(module, weight)
    return loss


def _squares(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
