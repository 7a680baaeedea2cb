"""Equal-function rewrites: numbers that move difficulty between a linear's inputs and its weight. Tensors only.

What they give is folded into the model by models/fold.py: the producer of the inputs is divided by the factors, the columns
that read them are multiplied; the float model's output stays the same.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fracbit.errors import RecipeError, near_matches
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme
from fracbit.transforms.awq import awq_factors
from fracbit.transforms.rotation import hadamard, rotation, turn_columns, turn_factors, turn_inputs
from fracbit.transforms.smooth import smooth_factors

Factors = Callable[[Sequence[Tensor], Sequence[Scheme], Stats], Tensor]
"""(weights [out, in] of the linears that read one input, their schemes, that input's statistics) -> factors [in] > 0."""

TRANSFORMS: dict[str, Factors] = {"smooth": smooth_factors, "awq": awq_factors}


def factors_of(name: str) -> Factors:
    """The transform called `name`. Raises `RecipeError` with near matches."""
    if name not in TRANSFORMS:
        raise RecipeError(f"unknown transform {name!r}; {near_matches(name, TRANSFORMS)}")
    return TRANSFORMS[name]


__all__ = [
    "TRANSFORMS",
    "Factors",
    "awq_factors",
    "factors_of",
    "hadamard",
    "rotation",
    "smooth_factors",
    "turn_columns",
    "turn_factors",
    "turn_inputs",
]
