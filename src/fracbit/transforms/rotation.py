"""Orthogonal matrices that spread outliers over all channels: Hadamard where the width allows, for any width.

A width n = 2^k m gets H_(2^k) (x) C_m, with the orthonormal cosine matrix C_m for the odd rest, and random signs; every entry
of H is +-1/sqrt(n), so that a single large channel becomes n small ones.

`rotation` is folded into weights. `turn_inputs` multiplies activations while the model runs, so it has no signs to store and is
applied factor by factor: about n (64 + 64 + m) multiplications a token for n = 4096 m.

Ref: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot); signs: Tseng et al. 2024, arXiv:2402.04396 (QuIP#).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fracbit.transforms.transform import Transform

LARGEST = 64  # side of a Hadamard factor: H of a power of two is the Kronecker product of smaller ones


def rotation(width: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix fp64 [width, width], the same for the same seed."""
    return random_signs(width, seed)[:, None] * hadamard(width)


def random_signs(width: int, seed: int = 0) -> Tensor:
    """+1 or -1 for every channel, fp64 [width]: what `rotation` is made of besides `hadamard`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1


def hadamard(width: int) -> Tensor:
    """H_(2^k) (x) C_m for `width` = 2^k m: orthogonal, fp64 [width, width]."""
    odd = _odd_part(width)
    return torch.kron(_hadamard(width // odd), _cosine(odd))


def turn_factors(
    width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """The Kronecker factors of `hadamard(width)`, powers of two first, the odd rest last."""
    odd = _odd_part(width)
    left, factors = width // odd, []
    while left > 1:
        factors.append(_hadamard(min(left, LARGEST)))  # [size, size]
        left //= len(factors[-1])
    factors += [_cosine(odd)] if odd > 1 else []  # [odd, odd]
    return tuple(factor.to(device, dtype) for factor in factors)


def turn_inputs(x: Tensor, factors: tuple[Tensor, ...] | None = None) -> Tensor:
    """`x` [..., n] times `hadamard(n)`, in the type of `x`, computed in fp32 or fp64 without the large matrix.

    `factors`: `turn_factors(n, x.device)`, for those who call often.
    """
    turned = x if x.dtype == torch.float64 else x.float()
    for factor in reversed(turn_factors(x.shape[-1], x.device, turned.dtype) if factors is None else factors):
        size = len(factor)
        product = turned.reshape(-1, size) @ factor  # [everything else, size]: the last axis is turned, ...
        turned = product.view(-1, x.shape[-1] // size, size).transpose(
            1, 2
        )  # ... and the next one moves to its place
    return turned.reshape(x.shape).to(x.dtype)


def turn_columns(weight: Tensor) -> Tensor:
    """The weight [out, in], fp32, that gives on turned inputs what `weight` gives on the inputs themselves."""
    return turn_inputs(weight.double()).float()


def _odd_part(width: int) -> int:
    return width // (width & -width)


def _hadamard(size: int) -> Tensor:
    """Sylvester's construction, orthonormal; `size` is a power of two."""
    result = torch.ones(1, 1, dtype=torch.float64)
    while len(result) < size:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result / math.sqrt(size)  # [size, size]


def _cosine(size: int) -> Tensor:
    """The orthonormal DCT-II matrix."""
    index = torch.arange(size, dtype=torch.float64)  # [size]
    result = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None]) * math.sqrt(2 / size)
    result[0] /= math.sqrt(2)
    return result


STREAM = Transform(stream_signs=random_signs)
INNER = Transform(turns_inner=True)
