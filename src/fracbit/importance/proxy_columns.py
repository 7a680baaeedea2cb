"""The proxy of arXiv:2212.09720 (Sec. 3, Eq. 2): the spread of the weights that produce an input; needs no data."""

from __future__ import annotations

from torch import Tensor


def unit_spread(weight: Tensor) -> Tensor:
    """Std of the weights of each output unit of a producing layer `[out, in]`: [out], fp32 (Eq. 2, population std)."""
    return weight.float().std(dim=1, correction=0)
