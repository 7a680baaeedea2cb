"""The lens of perturbation: errors of one strength and different character, and those that schemes really make."""

from fracbit.perturbation.exponent import best_exponent
from fracbit.perturbation.perturb import (
    PERTURBATIONS,
    Perturbation,
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
from fracbit.perturbation.scaling_units import UnitOf, from_units, to_units

__all__ = [
    "PERTURBATIONS",
    "Perturbation",
    "UnitOf",
    "best_exponent",
    "check_intensity",
    "check_share",
    "clipping",
    "error_profile",
    "from_units",
    "noise_on",
    "perturb",
    "perturb_like",
    "perturbation",
    "relative_intensity",
    "scheme_error",
    "to_units",
]
