"""The table of perturbations, their matching in L2 per scaling group, clipping, and the error that a scheme really makes.

Gong et al. 2024, arXiv:2403.06408: replace the error of quantization by an artificial one of equal strength to learn which
of its properties hurts. Relative intensity is |delta| / |x| in L2, per scaling group. To add a perturbation, write its
file, or a function in noise.py, and a line in records/tables.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fracbit.errors import RecipeError
from fracbit.numerics import decode, quantize_tensor
from fracbit.perturbation.noise import Perturbation
from fracbit.perturbation.scaling_groups import ScalingGroups, from_groups, to_groups
from fracbit.records import tables
from fracbit.records.scheme import Scheme
from fracbit.records.tables import Table

PERTURBATIONS: Table[Perturbation] = tables.PERTURBATIONS


def perturbation(name: str) -> Perturbation:
    """The perturbation called `name`. Raises `RecipeError` with near matches."""
    return PERTURBATIONS[name]


def perturb(
    x: Tensor, name: str, intensity: float, groups: ScalingGroups, generator: torch.Generator
) -> Tensor:
    """What to add to `x` [..., n], fp32: noise with |delta| = intensity |x| in every scaling group.

    `x` is a weight [out, in] where groups are the blocks of a scheme. Groups of zeros get zeros.
    Raises `RecipeError` when the intensity is not above 0.
    """
    check_intensity(intensity)
    rows, mask = to_groups(x.float(), groups)  # [groups, length]
    drawn = perturbation(name).draw(rows, mask, generator) * mask
    return from_groups(_scaled(drawn, rows.norm(dim=1) * intensity), x, groups)


def perturb_like(
    x: Tensor, error: Tensor, name: str, groups: ScalingGroups, generator: torch.Generator
) -> Tensor:
    """What to add to `x`: noise of the kind `name` with the L2 norm that `error` (of the shape of `x`) has in every group."""
    rows, mask = to_groups(x.float(), groups)  # [groups, length]
    drawn = perturbation(name).draw(rows, mask, generator) * mask
    return from_groups(_scaled(drawn, to_groups(error.float(), groups)[0].norm(dim=1)), x, groups)


def scheme_error(x: Tensor, scheme: Scheme) -> Tensor:
    """What round-to-nearest under `scheme` adds to `x` [out, in] or, for activations, [..., in]; fp32."""
    flat = x.float().reshape(-1, x.shape[-1])  # [out or tokens, in]
    return (decode(quantize_tensor(flat, scheme)) - flat).reshape(x.shape)


def clipping(x: Tensor, share: float, groups: ScalingGroups) -> Tensor:
    """What clipping the largest `share` of |x| in every group adds, fp32: it pulls them to the largest of the others.

    `share` 0.001 is 0.1 %; at least one number of a group of two or more is clipped. Raises `RecipeError` for a share outside
    0..1, both excluded.
    """
    check_share(share)
    rows, mask = to_groups(x.float(), groups)  # [groups, length]
    counts = (mask.sum(1) * share).ceil().long().clamp(min=1)  # [groups], how many are clipped
    ordered = (rows.abs() * mask).sort(dim=1, descending=True).values  # [groups, length]
    limit = ordered.gather(
        1, counts.clamp(max=rows.shape[1] - 1)[:, None]
    )  # [groups, 1], the largest that stays
    return from_groups((rows.clamp(-limit, limit) - rows) * mask, x, groups)


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


def error_profile(
    x: Tensor, delta: Tensor, groups: ScalingGroups, bins: int = 16
) -> list[tuple[float, float, int]]:
    """How large errors are where |x| is how large: (mean |x| / rms, rms of delta / rms of x, count) in bins of equal count.

    |x| and delta are taken relative to the rms of x in their scaling group, so that groups of all scales share an axis.
    """
    rows, mask = to_groups(x.float(), groups)  # [groups, length]
    errors = to_groups(delta.float(), groups)[0]
    rms = ((rows * mask).square().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).sqrt()  # [groups, 1]
    alive = mask & (rms > 0)  # [groups, length]
    size, error = (rows.abs() / rms)[alive], (errors / rms)[alive]  # [numbers]
    order = size.argsort()
    parts = zip(size[order].tensor_split(bins), error[order].tensor_split(bins), strict=True)
    return [(float(a.mean()), float(b.square().mean().sqrt()), len(a)) for a, b in parts if len(a)]


def check_intensity(intensity: float) -> None:
    """Refuse an intensity that perturbs nothing or everything. Raises `RecipeError`."""
    if not (math.isfinite(intensity) and intensity > 0):
        raise RecipeError(
            f"a relative intensity |delta| / |x| must be a finite number above 0, such as 0.01; got {intensity}"
        )


def check_share(share: float) -> None:
    """Refuse to clip nothing or everything. Raises `RecipeError`."""
    if not 0 < share < 1:
        raise RecipeError(
            f"the share to clip must lie between 0 and 1, both excluded, such as 0.001; got {share}"
        )


def _scaled(drawn: Tensor, norms: Tensor) -> Tensor:
    """`drawn` [groups, length] with these L2 norms [groups]."""
    norm = drawn.norm(dim=1)  # [groups]
    # A draw can be zero where x is (growing-scaled on a lone zero): nothing to scale, and the norm asked for is zero as well.
    factor = torch.where(norm > 0, norms / norm.clamp(min=1e-30), 0.0)
    return drawn * factor[:, None]  # [groups, length]
