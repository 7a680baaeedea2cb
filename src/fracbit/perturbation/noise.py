"""Perturbations of one strength and different character. Gong et al. 2024, arXiv:2403.06408, section 3.

Every function returns rows [groups, length] of any norm; `perturb` scales each scaling group to the norm that was asked for.

- `gaussian`, `uniform`, `rademacher`: shape only, independent of x.
- `growing`, `shrinking` (the paper's Delta_M+ and Delta_M-): larger, or smaller, where |x| is larger. The paper's construction
  is not known; there are two here, both with the sign left random: `sorted` draws Gaussian magnitudes and hands the largest
  to the largest |x| (or the smallest), so the histogram of the noise is that of `gaussian`; `scaled` multiplies Gaussian
  noise by |x| / rms(x), or by rms(x) / |x| at most `CAP`, since an unbounded 1 / |x| would put all energy on near-zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

CAP = 4.0
Draw: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(rows of x [units, length], mask of what is no padding, generator) -> rows of noise."""


@dataclass(frozen=True)
class Perturbation:
    """One line of the table: `draw` makes rows of noise from rows of x, `about` says how it relates to x."""

    draw: Draw
    about: str


def gaussian(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(rows.shape, generator=generator, device=rows.device)


def uniform(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on [-1, 1): the shape of a rounding error on a fine even grid."""
    return torch.rand(rows.shape, generator=generator, device=rows.device) * 2 - 1


def rademacher(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """+1 or -1 with equal chance: every number is moved equally far."""
    return torch.randint(0, 2, rows.shape, generator=generator, device=rows.device).float() * 2 - 1


def growing_sorted(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian magnitudes, the largest on the largest |x|."""
    return _by_rank(rows, mask, generator, descending=False)


def shrinking_sorted(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian magnitudes, the largest on the smallest |x|."""
    return _by_rank(rows, mask, generator, descending=True)


def growing_scaled(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise times |x| / rms(x)."""
    return gaussian(rows, mask, generator) * rows.abs() / _rms(rows, mask)


def shrinking_scaled(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise times rms(x) / |x|, at most `CAP`."""
    return gaussian(rows, mask, generator) * (_rms(rows, mask) / rows.abs().clamp(min=1e-30)).clamp(max=CAP)


def _rms(rows: Tensor, mask: Tensor) -> Tensor:
    return ((rows * mask).square().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).sqrt().clamp(min=1e-30)


def _by_rank(rows: Tensor, mask: Tensor, generator: torch.Generator, descending: bool) -> Tensor:
    noise = gaussian(rows, mask, generator)  # [groups, length]
    signs = rademacher(rows, mask, generator)
    # Padding sorts behind everything on both sides, so that it trades magnitudes with itself only.
    behind = -torch.inf if descending else torch.inf
    magnitudes = noise.abs().masked_fill(~mask, behind).sort(dim=1, descending=descending).values
    order = rows.abs().masked_fill(~mask, torch.inf).argsort(dim=1)
    return torch.empty_like(noise).scatter_(1, order, magnitudes).masked_fill_(~mask, 0.0) * signs


GAUSSIAN = Perturbation(gaussian, "normal, independent of x")
UNIFORM = Perturbation(uniform, "uniform, independent of x")
RADEMACHER = Perturbation(rademacher, "plus or minus one magnitude, independent of x")
GROWING = Perturbation(growing_sorted, "largest where |x| is largest; magnitudes sorted")
GROWING_SCALED = Perturbation(growing_scaled, "largest where |x| is largest; normal times |x|")
SHRINKING = Perturbation(shrinking_sorted, "largest where |x| is smallest; magnitudes sorted")
SHRINKING_SCALED = Perturbation(shrinking_scaled, "largest where |x| is smallest; normal over |x|, capped")
