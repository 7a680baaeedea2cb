"""The exponent of non-uniform quantization, searched per tensor: sign(x)|x|^a with the a of least reconstruction error.

Gong et al. 2024 (arXiv:2403.06408) fix a = 1/3 for every tensor; PowerQuant (ICLR 2023) searches it, and finds the error
locally convex in a. Heavy tails and long blocks want a small exponent, Gaussian tensors in short blocks one near 1. The data
type `power:fit` searches the same exponents and stores its table.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fracbit.numerics.datatypes import EXPONENTS
from fracbit.perturbation.perturb import scheme_error
from fracbit.records.scheme import Scheme


def best_exponent(x: Tensor, scheme: Scheme, exponents: Sequence[str] = EXPONENTS) -> Scheme:
    """`scheme` as a power type with the exponent that leaves the least squared error in `x` [..., in]; ties take the first."""
    schemes = [replace(scheme, dtype=f"power:{exponent}") for exponent in exponents]
    errors = [float(scheme_error(x, candidate).double().square().sum()) for candidate in schemes]
    return schemes[errors.index(min(errors))]
