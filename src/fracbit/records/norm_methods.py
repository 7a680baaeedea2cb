"""How `tweak` may move the norms of a checkpoint that another program quantized. Torch-free."""

from __future__ import annotations

from fracbit.errors import RecipeError
from fracbit.records.named import read_named
from fracbit.records.tables import CORRECTIONS

NORM_METHODS = ("auto", "adam", "closed")
ON_TEXT, ON_PREDICTIONS = "text", "predictions"
"""The whole model at once: without a float model, and with one."""


def check_norm_method(method: str | None, against: object) -> None:
    """Refuse a method without the float model that it fits to, and one that moves more than norms. Raises `RecipeError`."""
    if against is None and method is not None:
        raise RecipeError(
            f"method {method} fits norms to a float model; name it with against (--against), or leave the method out"
        )
    word = method or ON_PREDICTIONS
    if word != ON_PREDICTIONS and read_named(word, CORRECTIONS).name not in NORM_METHODS:
        known = ", ".join((*NORM_METHODS, ON_PREDICTIONS))
        raise RecipeError(f"method {word} moves more than norms; use one of {known}")
