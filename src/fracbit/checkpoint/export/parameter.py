"""The parameter of a format, after its name and a colon."""

from __future__ import annotations

from collections.abc import Collection

from fracbit.errors import RecipeError


def without_parameter(name: str, parameter: str) -> None:
    """Raise `RecipeError` unless there is none."""
    if parameter:
        raise RecipeError(f"format {name} takes no parameter, got {parameter!r}; write {name}")


def one_of(name: str, parameter: str, allowed: Collection[str], what: str) -> str:
    """The parameter, which is one of `allowed` or empty. Raises `RecipeError` naming them; `what` says what it chooses."""
    if parameter and parameter not in allowed:
        known = ", ".join(f"{name}:{each}" for each in allowed)
        raise RecipeError(f"format {name} has no {what} {parameter!r}; write {name}, {known}")
    return parameter
