"""Quantizers: (weight, scheme, stats) -> Quantized. To add one, write its file and a line in `QUANTIZERS`."""

from collections.abc import Callable

from fracbit.errors import RecipeError, near_matches
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.quantizers.rtn import RoundToNearest

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "rtn": RoundToNearest,
}


def quantizer(name: str, search: bool = False) -> Quantizer:
    """The quantizer called `name`. Raises `RecipeError` with near matches."""
    if name not in QUANTIZERS:
        raise RecipeError(f"unknown quantizer {name!r}; {near_matches(name, QUANTIZERS)}")
    return QUANTIZERS[name](search=search)


__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "RoundToNearest", "quantizer"]
