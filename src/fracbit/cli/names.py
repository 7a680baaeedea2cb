"""Checks the names on a command line before anything slow is imported. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fracbit.errors import RecipeError, SchemeError, near_matches
from fracbit.records.allocation import read_level
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending, check_terms
from fracbit.records.tables import DATATYPES, PERTURBATIONS, SCORES
from fracbit.records.text_source import check_source

FLOAT_TYPES = ("auto", "float32", "bfloat16", "float16", "float64")  # as checkpoint/load.py takes them
ACTIVATIONS = ("float", "int8")  # as kernels take them


def check_names(recipe: Recipe, spending: Spending) -> None:
    """Raises `RecipeError` or `SchemeError` with near matches for an unknown score or data type, and as `check_terms`."""
    outside = [recipe.embeddings, recipe.head, recipe.towers]
    chosen = [recipe.scheme, *outside, *(each.scheme for each in recipe.overrides)]
    for scheme in (*chosen, *spending.schemes):
        check_dtype(scheme)
    check_score(str(spending.score))
    check_terms(recipe, spending)


def check_texts(read: Sequence[str | None] = (), judged: Sequence[str | None] = ()) -> None:
    """Raises `DataError` for a text that is not there, and for `generated` among those that a model is `judged` on."""
    for texts, written in ((read, True), (judged, False)):
        for text in texts:
            if text is not None:
                check_source(text, written)


def check_score(name: str) -> None:
    """Raises `RecipeError` for a score that is neither in the table (without `reverse:`) nor a JSON file."""
    if Path(name).suffix != ".json":
        SCORES.check(name.removeprefix("reverse:"))


def check_errors(kinds: Sequence[str]) -> None:
    """Raises `RecipeError` for an error of the lens that is not noise, `clip:SHARE` or a scheme."""
    for kind in kinds:
        if kind not in PERTURBATIONS and not kind.startswith("clip:"):
            try:
                check_dtype(read_level(kind))
            except SchemeError as error:
                more = "; or clip:0.001, or a scheme such as int3z/64"
                raise RecipeError(
                    f"unknown error {kind!r}; {near_matches(kind, PERTURBATIONS)}{more}"
                ) from error


def check_dtype(scheme: Scheme | None) -> None:
    """Raises `SchemeError` for a scheme of an unknown data type."""
    if scheme is not None:
        DATATYPES.check(scheme.dtype.partition(":")[0])


def check_types(dtype: str, activations: str = "float") -> None:
    """Raises `RecipeError` for an unknown type of the model or of its activations."""
    check_word("dtype", dtype, FLOAT_TYPES)
    check_word("--activations value", activations, ACTIVATIONS)


def check_word(what: str, word: str, known: tuple[str, ...]) -> None:
    """Raises `RecipeError` where `word` is none of the `known` ones."""
    if word not in known:
        raise RecipeError(f"unknown {what} {word!r}; {near_matches(word, known)}")
