"""AWQ: enlarge the columns that meet large activations, by the power of their energy that loses least.

    s = m^r / sqrt(max m^r min m^r),  m_j = rms(x_j),   r* = argmin_r || Q(W s) s^-1 X - W X ||      (Lin et al. 2023,
                                                                                      arXiv:2306.00978, Eq. 4 and 5)

The search needs no forward pass: the gram matrix gives the error of every candidate exactly. Under blocks along the output a
column has scales of its own and any factor cancels: those schemes get none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.ranges import quantize_tensor
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme
from fracbit.transforms.transform import Transform

STEPS = 20


def awq_factors(weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats) -> Tensor:
    """Factors [in] for the columns of `weights` [out, in]; ones where nothing is gained.

    Raises `WeightError` without a gram matrix.
    """
    if stats.gram is None:
        raise WeightError("awq reads the gram matrix of the inputs; observe with gram=True")
    ones = torch.ones_like(stats.energy)  # [in]
    if all(scheme.axis == "out" for scheme in schemes):
        return ones
    # Magnitude of each input; a dead one counts as the quietest that is alive.
    size = (stats.energy / max(stats.tokens, 1)).sqrt()  # [in]
    size = torch.where(size > 0, size, size[size > 0].min() if bool((size > 0).any()) else ones)
    # Powers of it, from none to all.
    best, best_loss = ones, _loss(weights, schemes, stats.gram, ones)
    for step in range(1, STEPS):
        factors = size ** (step / STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        loss = _loss(weights, schemes, stats.gram, factors)
        if loss < best_loss:
            best, best_loss = factors, loss
    return best


def _loss(weights: Sequence[Tensor], schemes: Sequence[Scheme], gram: Tensor, factors: Tensor) -> float:
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        decoded = decode(quantize_tensor(weight.float() * factors, scheme)) / factors  # [out, in]
        total += float(gram_errors(weight.float() - decoded, gram).sum())
    return total


AWQ = Transform(awq_factors)
