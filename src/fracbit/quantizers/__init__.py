"""Quantizers: (weight, scheme, stats) -> Quantized. To add one, write its file and a line in `QUANTIZERS`."""

from collections.abc import Callable
from functools import partial

from fracbit.errors import RecipeError, near_matches
from fracbit.quantizers.gptq import Gptq
from fracbit.quantizers.outliers import KeepColumns
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.quantizers.rtn import RoundToNearest

DESCENT_ROUNDS = 12  # at most: rounds end when they gain less than a thousandth

QUANTIZERS: dict[str, Callable[..., Gptq | RoundToNearest]] = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "descent": partial(Gptq, rounds=DESCENT_ROUNDS),
}


def quantizer(name: str, search: bool = False, outliers: float = 0.0) -> Quantizer:
    """The quantizer called `name`, keeping a share `outliers` of all input columns in 16 bits.

    Raises `RecipeError` with near matches.
    """
    if name not in QUANTIZERS:
        raise RecipeError(f"unknown quantizer {name!r}; {near_matches(name, QUANTIZERS)}")
    fill = QUANTIZERS[name](search=search)
    return KeepColumns(fill, outliers) if outliers else fill


def nearest_of(fill: Quantizer, search: bool) -> Quantizer:
    """Round-to-nearest with whatever `fill` keeps in 16 bits."""
    return fill.nearest(search) if isinstance(fill, KeepColumns) else RoundToNearest(search)


__all__ = [
    "QUANTIZERS",
    "Gptq",
    "KeepColumns",
    "Quantized",
    "Quantizer",
    "RoundToNearest",
    "nearest_of",
    "quantizer",
]
