"""Proxy (outlier-dependent) quantization: which input columns of a linear stay in 16 bits (arXiv:2212.09720, Sec. 3, Eq. 2).

The columns that meet outlier activations hurt most when rounded, and they betray themselves without any data: the unit that
produces such an activation has weights of unusually large standard deviation. So the std of every output unit's weights in the
producing layer scores the input columns of the consuming one, and the largest `share` of them is kept.

Two controls answer whether the proxy earns its bits: columns drawn at random, and columns chosen by the activations
themselves. A share p of columns costs p (16 - k) bits per weight, which `stored_bits` counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.numerics.packed import outlier_count


def unit_spread(weight: Tensor) -> Tensor:
    """Std of the weights of each output unit of a producing layer `[out, in]`: [out], fp32 (Eq. 2, population std)."""
    return weight.float().std(dim=1, correction=0)


def largest_columns(scores: Tensor, share: float) -> Tensor:
    """The `share` of columns with the largest `scores` [in], ascending, int32 [p]. Ties go to the earlier column."""
    order = scores.argsort(descending=True, stable=True)
    return order[: outlier_count(len(scores), share)].sort().values.to(torch.int32)


def random_columns(inputs: int, share: float, generator: torch.Generator) -> Tensor:
    """The control: as many columns, drawn without replacement from `generator`; int32 [p] ascending."""
    drawn = torch.randperm(inputs, generator=generator)[: outlier_count(inputs, share)]
    return drawn.sort().values.to(torch.int32)
