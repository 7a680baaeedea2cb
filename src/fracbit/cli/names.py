"""Checks the names on a command line before anything slow is imported. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fracbit.checkpoint.export.one_file import FORMATS_OF, check_ending, check_file, is_one_file
from fracbit.checkpoint.folder import check_output
from fracbit.checkpoint.place import check_model
from fracbit.errors import (
    DataError,
    FormatError,
    OutputError,
    RecipeError,
    SchemeError,
    check_choice,
    near_matches,
)
from fracbit.records.allocation import read_level
from fracbit.records.extras import check_extra
from fracbit.records.files import named_path
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending, check_terms
from fracbit.records.tables import DATATYPES, FORMATS, PERTURBATIONS, SCORES
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


def check_models(*models: str | None) -> None:
    """Raises `SourceError` for a model that is not there; the last of a command's checks, since it may ask the hub."""
    for model in models:
        if model is not None:
            check_model(model)


def check_tasks(tasks: str | None) -> str | None:
    """The tasks themselves. Raises `DataError` where nothing is installed that asks them."""
    if tasks is not None:
        check_extra("a zero-shot task", "lm_eval", "eval", DataError)
    return tasks


def check_export(output: Path, format_: str, *, overwrite: bool, resume: bool) -> None:
    """Raises as `export` for an unknown format, an output that may not be written and a missing package."""
    name = FORMATS.check(format_.partition(":")[0])
    check_ending(output, format_, f"export {FORMATS_OF.get(output.suffix)}")
    if is_one_file(output):
        check_file(output, overwrite=overwrite, resume=resume)
    elif not resume:
        check_output(output, "", overwrite, resume)
    check_format(name)


def check_better(output: Path, calibration: Sequence[str], *, overwrite: bool, resume: bool) -> None:
    """Raises as `tweak` and `refine` for texts that are not there and a folder that may not be written."""
    check_texts(read=calibration)
    if not resume:
        check_output(named_path(output, OutputError), "", overwrite, resume)


def check_format(format_: str) -> None:
    """Raises `FormatError` where the package that writes a format is not installed."""
    if format_ == "gguf":
        check_extra("writing a GGUF file", "gguf", "gguf", FormatError)


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
    check_choice("dtype", dtype, FLOAT_TYPES)
    check_choice("type of activations", activations, ACTIVATIONS)
