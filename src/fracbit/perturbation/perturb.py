"""The table of perturbations, their matching in L2 per scaling unit, clipping, and the error that a scheme really makes.

Gong et al. 2024, arXiv:2403.06408: replace the error of quantization by an artificial one of equal strength to learn which
of its properties hurts. Relative intensity is |delta| / |x| in L2, per scaling unit. To add a perturbation, write it in
noise.py and a line in `PERTURBATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.errors import RecipeError, near_matches
from fracbit.numerics import decode, quantize_tensor
from fracbit.perturbation import noise
from fracbit.perturbation.scaling_units import UnitOf, from_units, to_units
from fracbit.records.scheme import Scheme

Draw: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Perturbation:
    """One line of the table: `draw` makes rows of noise from rows of x, `about` says how it relates to x."""

    draw: Draw
    about: str


PERTURBATIONS: dict[str, Perturbation] = {
    "gaussian": Perturbation(noise.gaussian, "normal, independent of x"),
    "uniform": Perturbation(noise.uniform, "uniform, independent of x"),
    "rademacher": Perturbation(noise.rademacher, "plus or minus one magnitude, independent of x"),
    "growing": Perturbation(noise.growing_sorted, "largest where |x| is largest; magnitudes sorted"),
    "growing-scaled": Perturbation(noise.growing_scaled, "largest where |x| is largest; normal times |x|"),
    "shrinking": Perturbation(noise.shrinking_sorted, "largest where |x| is smallest; magnitudes sorted"),
    "shrinking-scaled": Perturbation(
        noise.shrinking_scaled, "largest where |x| is smallest; normal over |x|, capped"
    ),
}


def perturbation(name: str) -> Perturbation:
    """The perturbation called `name`. Raises `RecipeError` with near matches."""
    if name not in PERTURBATIONS:
        raise RecipeError(f"unknown perturbation {name!r}; {near_matches(name, PERTURBATIONS)}")
    return PERTURBATIONS[name]


def perturb(x: Tensor, name: str, intensity: float, unit: UnitOf, generator: torch.Generator) -> Tensor:
    """What to add to `x` [..., n] (a weight [out, in] for units that are blocks): |delta| = intensity |x| in every unit.

    fp32; zero in units of zeros. Raises `RecipeError` when the intensity is not above 0.
    """
    check_intensity(intensity)
    rows, mask = to_units(x.float(), unit)
    return _matched(x, rows, mask, rows.norm(dim=1) * intensity, perturbation(name).draw, unit, generator)


def perturb_like(x: Tensor, error: Tensor, name: str, unit: UnitOf, generator: torch.Generator) -> Tensor:
    """What to add to `x`: noise of the kind `name` with the L2 norm that `error` (of the shape of `x`) has in every unit."""
    rows, mask = to_units(x.float(), unit)
    target = to_units(error.float(), unit)[0].norm(dim=1)
    return _matched(x, rows, mask, target, perturbation(name).draw, unit, generator)


def scheme_error(x: Tensor, scheme: Scheme) -> Tensor:
    """What round-to-nearest under `scheme` adds to `x` [out, in] or, for activations, [tokens, in]; fp32."""
    flat = x.float().reshape(-1, x.shape[-1])
    return (decode(quantize_tensor(flat, scheme)) - flat).reshape(x.shape)


def clipping(x: Tensor, share: float, unit: UnitOf) -> Tensor:
    """What clipping the largest `share` of |x| in every unit adds: it pulls them to the largest of the others; fp32.

    `share` 0.001 is 0.1 %; at least one number of a unit of two or more is clipped. Raises `RecipeError` for a share outside
    0..1, both excluded.
    """
    check_share(share)
    rows, mask = to_units(x.float(), unit)
    counts = (mask.sum(1) * share).ceil().long().clamp(min=1)  # clipped in each unit
    ordered = (rows.abs() * mask).sort(dim=1, descending=True).values
    limit = ordered.gather(1, counts.clamp(max=rows.shape[1] - 1)[:, None])  # the largest that is kept
    return from_units((rows.clamp(-limit, limit) - rows) * mask, x, unit)


def noise_on(x: Tensor, error: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise on the elements that `error` moves, of the L2 norm it has there: the control for clipping."""
    moved = error != 0
    drawn = torch.randn(x.shape, generator=generator, device=x.device) * moved
    norm = drawn.norm()
    return drawn * (error.norm() / norm) if bool(norm > 0) else drawn


def relative_intensity(delta: Tensor, x: Tensor) -> float:
    """|delta| / |x| in L2 over the whole tensor; NaN for an x of zeros."""
    power = float(x.double().square().sum())
    return math.sqrt(float(delta.double().square().sum()) / power) if power > 0 else math.nan


def error_profile(x: Tensor, delta: Tensor, unit: UnitOf, bins: int = 16) -> list[tuple[float, float, int]]:
    """How large errors are where |x| is how large: (mean |x| / rms, rms of delta / rms of x, count) in bins of equal count.

    |x| and delta are taken relative to the rms of x in their scaling unit, so that units of all scales share an axis.
    """
    rows, mask = to_units(x.float(), unit)
    errors = to_units(delta.float(), unit)[0]
    rms = ((rows * mask).square().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).sqrt()
    alive = mask & (rms > 0)
    size, error = (rows.abs() / rms)[alive], (errors / rms)[alive]
    order = size.argsort()
    parts = zip(size[order].tensor_split(bins), error[order].tensor_split(bins), strict=True)
    return [(float(a.mean()), float(b.square().mean().sqrt()), len(a)) for a, b in parts if len(a)]


def check_intensity(intensity: float) -> None:
    """Refuse an intensity that perturbs nothing or everything. Raises `RecipeError`."""
    if not (math.isfinite(intensity) and intensity > 0):
        raise RecipeError(
            f"a relative intensity of {intensity} is none; give |delta| / |x| above 0, such as 0.01"
        )


def check_share(share: float) -> None:
    """Refuse to clip nothing or everything. Raises `RecipeError`."""
    if not 0 < share < 1:
        raise RecipeError(
            f"a share of {share} clips nothing that makes sense; give one between 0 and 1, such as 0.001"
        )


def _matched(
    x: Tensor,
    rows: Tensor,
    mask: Tensor,
    target: Tensor,
    draw: Draw,
    unit: UnitOf,
    generator: torch.Generator,
) -> Tensor:
    drawn = draw(rows, mask, generator) * mask
    norm = drawn.norm(dim=1)
    # A draw can be zero where x is (growing-scaled on a lone zero): nothing to scale, and its target is zero as well.
    factor = torch.where(norm > 0, target / norm.clamp(min=1e-30), 0.0)
    return from_units(drawn * factor[:, None], x, unit)
