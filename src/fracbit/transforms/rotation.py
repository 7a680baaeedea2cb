"""Orthogonal matrices that spread outliers over all channels: Hadamard where the width allows, for any width.

A width n = 2^k m gets H_(2^k) (x) C_m, with the orthonormal cosine matrix C_m for the odd rest, and random signs; every entry
of H is +-1/sqrt(n), so that a single large channel becomes n small ones.

Ref: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot); signs: Tseng et al. 2024, arXiv:2402.04396 (QuIP#).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(width: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix fp64 [width, width], the same for the same seed."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs[:, None] * torch.kron(_hadamard(width // odd), _cosine(odd))


def _hadamard(size: int) -> Tensor:
    """Sylvester's construction, orthonormal; `size` is a power of two."""
    result = torch.ones(1, 1, dtype=torch.float64)
    while len(result) < size:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result / math.sqrt(size)


def _cosine(size: int) -> Tensor:
    """The orthonormal DCT-II matrix."""
    index = torch.arange(size, dtype=torch.float64)
    result = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None]) * math.sqrt(2 / size)
    result[0] /= math.sqrt(2)
    return result
