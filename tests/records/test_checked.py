"""Records that users write refuse what cannot be where it is written: with the field, what was got, and what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fracbit.errors import FracbitError, RecipeError, SchemeError
from fracbit.records.calibration import Calibration
from fracbit.records.outliers import Outliers
from fracbit.records.recipe import Override, Recipe, make_recipe, read_toml
from fracbit.records.row import Run

FAULTS: list[tuple[type, dict[str, Any], type[FracbitError], str]] = [
    (Recipe, {}, RecipeError, "model is missing; name a folder or a hub id"),
    (Recipe, {"model": "m", "quantiser": "rtn"}, RecipeError, "no key 'quantiser'; did you mean 'quantizer'"),
    (Recipe, {"model": "m", "quantizer": "gpt"}, RecipeError, "unknown quantizer 'gpt'; did you mean 'gptq'"),
    (Recipe, {"model": "m", "search": "maybe"}, RecipeError, "search is 'maybe'; it should be a valid boolean"),
    (Recipe, {"model": "m", "scheme": "nf"}, SchemeError, "'nf' is not a scheme"),
    (Recipe, {"model": "m", "scheme": "float"}, SchemeError, "quantizes nothing"),
    (Recipe, {"model": "m", "head": 4}, RecipeError, "head is 4; it should be a scheme in one word, such as nf4/64"),
    (Recipe, {"model": "m", "outliers": {"chosen": "cots", "share": 0.1}}, RecipeError, "did you mean 'cost'"),
    (Recipe, {"model": "m", "calibration": "t.txt"}, RecipeError, "calibration is 't.txt'; it should be a table"),
    (Recipe, {"model": "m", "calibration": {"text": "t"}}, RecipeError, "'calibration.text'; did you mean 'texts'"),
    (Recipe, {"model": "m", "calibration": {}}, RecipeError, "calibration.texts is missing; .*--calibration FILE"),
    (Recipe, {"model": "m", "overrides": [{"keep": True}]}, RecipeError, "overrides.0.layers is missing; .*pattern"),
    (Calibration, {"texts": "x"}, RecipeError, r"texts is 'x'; it should be a list, such as \['x'\]"),
    (Calibration, {"texts": ["x"], "samples": 0}, RecipeError, "samples is 0; .* greater than or equal to 1"),
    (Calibration, {"texts": ["x"], "chain": "both"}, RecipeError, "chain is 'both'; known: float, quantized"),
    (Override, {"layer": "x"}, RecipeError, "an override has no key 'layer'; did you mean 'layers'"),
    (Outliers, {"chosen": "cots", "share": 0.1}, RecipeError, "unknown column rule 'cots'; did you mean 'cost'"),
    (Outliers, {"chosen": "cost", "share": 2}, RecipeError, "share is 2; it should be less than 1"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "fields", "error", "says"), FAULTS)
def test_a_fault_is_one_of_our_errors(
    record: type, fields: dict[str, Any], error: type[FracbitError], says: str
) -> None:
    with pytest.raises(error, match=says):
        record(**fields)


@pytest.mark.parametrize(("fields", "says"), [(case[1], case[3]) for case in FAULTS if case[0] is Recipe])
def test_a_file_is_refused_in_the_same_words(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(FracbitError, match=says):
        make_recipe(fields)


def test_a_file_names_the_line_of_the_key_or_of_its_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for text, line in (("samples = 0\ntexts = ['t']", 3), ("samples = 3", 2), ("texts = 't'", 3)):
        path.write_text(f"model = 'm'\n[calibration]\n{text}\n")
        with pytest.raises(RecipeError, match=f"recipe.toml, line {line}: calibration"):
            make_recipe(read_toml(path), path)


def test_a_record_inside_another_keeps_the_keys_that_lead_to_it() -> None:
    """Pydantic checks a recipe inside a run, so that its fault is found below `recipe`."""
    with pytest.raises(ValidationError) as caught:
        Run.model_validate({"recipe": {"model": "m", "seed": "x"}, "evaluation": {"text": "t"}})
    assert caught.value.errors()[0]["loc"] == ("recipe", "seed")
