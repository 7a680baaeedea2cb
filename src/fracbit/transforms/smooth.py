"""SmoothQuant: share the range of a channel between its activations and its weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha);      X / s,  W * s            (Xiao et al. 2023, arXiv:2211.10438, Eq. 4)

alpha = 0.5 evens both; larger moves more into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme
from fracbit.transforms.transform import Transform

ALPHA = 0.5
LIMIT = 1e4  # factors beyond are channels that are dead on one side


def smooth_factors(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats, alpha: float = ALPHA
) -> Tensor:
    """Factors [in] for the columns of `weights` [out, in]; the inputs are to be divided by them. Dead channels keep 1."""
    columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)  # [in]
    alive = (stats.absmax > 0) & (columns > 0)  # [in]
    found = stats.absmax.clamp(min=1e-12) ** alpha / columns.clamp(min=1e-12) ** (1 - alpha)
    return torch.where(alive, found.clamp(1 / LIMIT, LIMIT), 1.0)


SMOOTH = Transform(smooth_factors)
