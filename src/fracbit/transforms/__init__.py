"""Equal-function rewrites: numbers that move difficulty between a linear's inputs and its weight. Tensors only.

To add one, write its file and a line in records/tables.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from fracbit.records import tables
from fracbit.records.tables import Table
from fracbit.transforms.awq import awq_factors
from fracbit.transforms.rotation import hadamard, rotation, turn_columns, turn_factors, turn_inputs
from fracbit.transforms.smooth import smooth_factors
from fracbit.transforms.transform import Factors, Transform

TRANSFORMS: Table[Transform] = tables.TRANSFORMS


def transforms_of(names: Sequence[str]) -> tuple[Transform, ...]:
    """The transforms of these names, in their order. Raises `RecipeError` with near matches."""
    return tuple(TRANSFORMS[name] for name in names)


__all__ = [
    "TRANSFORMS",
    "Factors",
    "Transform",
    "awq_factors",
    "hadamard",
    "rotation",
    "smooth_factors",
    "transforms_of",
    "turn_columns",
    "turn_factors",
    "turn_inputs",
]
