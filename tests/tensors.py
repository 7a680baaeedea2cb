"""Random tensors that a test can draw again, and how far one is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    """A stream of numbers of its own."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(*shape, generator=seeded(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def uneven(out: int, width: int, seed: int = 0) -> Tensor:
    """Heavy tails and rows of very different scale: where matching over the whole tensor would go wrong."""
    return normal(out, width, seed=seed) ** 3 * torch.logspace(-3, 3, out)[:, None]
