"""The lens of perturbation: errors of one strength and different character, and those that schemes really make."""

from fracbit.perturbation.exponent import best_exponent
from fracbit.perturbation.noise import Perturbation
from fracbit.perturbation.perturb import (
    PERTURBATIONS,
    check_intensity,
    check_share,
    clipping,
    error_profile,
    noise_on,
    perturb,
    perturb_like,
    perturbation,
    relative_intensity,
    scheme_error,
)
from fracbit.perturbation.scaling_groups import ScalingGroups, from_groups, to_groups

__all__ = [
    "PERTURBATIONS",
    "Perturbation",
    "ScalingGroups",
    "best_exponent",
    "check_intensity",
    "check_share",
    "clipping",
    "error_profile",
    "from_groups",
    "noise_on",
    "perturb",
    "perturb_like",
    "perturbation",
    "relative_intensity",
    "scheme_error",
    "to_groups",
]
