"""Quantizers: (weight, scheme, stats) -> Quantized. To add one, write its file and a line in `QUANTIZERS`."""

from collections.abc import Callable
from functools import partial

from fracbit.errors import RecipeError, near_matches
from fracbit.quantizers.gptq import Gptq
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.quantizers.rtn import RoundToNearest

DESCENT_ROUNDS = 12  # at most: rounds end when they gain less than a thousandth

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "descent": partial(Gptq, rounds=DESCENT_ROUNDS),
}


def quantizer(name: str, search: bool = False) -> Quantizer:
    """The quantizer called `name`. Raises `RecipeError` with near matches."""
    if name not in QUANTIZERS:
        raise RecipeError(f"unknown quantizer {name!r}; {near_matches(name, QUANTIZERS)}")
    return QUANTIZERS[name](search=search)


__all__ = ["QUANTIZERS", "Gptq", "Quantized", "Quantizer", "RoundToNearest", "quantizer"]
