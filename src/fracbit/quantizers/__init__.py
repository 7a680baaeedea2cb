"""Quantizers: (weight, scheme, stats) -> Quantized. To add one, write its file and a line in records/tables.py."""

from __future__ import annotations

from collections.abc import Callable

from fracbit.quantizers.columns import Rule
from fracbit.quantizers.group import quantize_group
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.quantizers.rtn import RoundToNearest
from fracbit.records import tables
from fracbit.records.tables import Table

QUANTIZERS: Table[Callable[[bool], Quantizer]] = tables.QUANTIZERS
COLUMN_RULES: Table[Rule] = tables.COLUMN_RULES


def quantizer(name: str, search: bool = False) -> Quantizer:
    """The quantizer called `name`. Raises `RecipeError` with near matches."""
    return QUANTIZERS.load(name)(search)


def nearest(search: bool) -> Quantizer:
    """Round-to-nearest: what is used where a linear saw no data, and what every other quantizer must beat."""
    return RoundToNearest(search)


__all__ = [
    "COLUMN_RULES",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "Rule",
    "nearest",
    "quantize_group",
    "quantizer",
]
