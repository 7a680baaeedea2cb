"""Quantizers: (weight, scheme, stats) -> Quantized. To add one, write its file and a line in records/tables.py."""

from __future__ import annotations

from collections.abc import Callable

from fracbit.errors import RecipeError
from fracbit.quantizers.columns import Rule
from fracbit.quantizers.gptq import refined
from fracbit.quantizers.group import quantize_group
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.quantizers.rtn import RoundToNearest
from fracbit.records import tables
from fracbit.records.named import read_named
from fracbit.records.tables import Table

QUANTIZERS: Table[Callable[..., Quantizer]] = tables.QUANTIZERS
COLUMN_RULES: Table[Rule] = tables.COLUMN_RULES


def quantizer(word: str, search: bool = False) -> Quantizer:
    """The quantizer of a word such as `gptq` or `gptq:damping=0.05`.

    Raises `RecipeError` for an unknown name, an unknown option and a value that the option does not take.
    """
    named = read_named(word, QUANTIZERS)
    options = dict(named.options)
    if "search" in options:
        raise RecipeError(f"quantizer {word!r}: search is a setting of its own; write search=true beside it")
    return QUANTIZERS.load(named.name)(search=search, **options)


def nearest(search: bool) -> Quantizer:
    """Round-to-nearest: what is used where a linear saw no data, and what every other quantizer must beat."""
    return RoundToNearest(search=search)


__all__ = [
    "COLUMN_RULES",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "Rule",
    "nearest",
    "quantize_group",
    "quantizer",
    "refined",
]
