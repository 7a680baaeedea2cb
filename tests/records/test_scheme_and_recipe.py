"""Schemes and recipes: what cannot be is refused with the remedy; JSON round trips; keys name contents."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fracbit.errors import RecipeError, SchemeError
from fracbit.records.recipe import key, make_recipe, read_toml
from fracbit.records.scheme import Scheme, parse_scheme

SCHEMES = st.builds(
    Scheme,
    st.sampled_from(["int", "nf", "float:e3m0", "power:1/2", "kmeans:row"]),
    st.integers(1, 8),
    st.one_of(st.integers(1, 4096), st.sampled_from(["row", "tensor", "flat:64"])),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["none", "zero", "float", "mean"]),
    st.sampled_from(["fp32", "fp16", "bf16", "int8:256"]),
)


@given(SCHEMES)
def test_json_round_trip(scheme: Scheme) -> None:
    assert Scheme.from_json(scheme.to_json()) == scheme
    assert hash(scheme) == hash(Scheme.from_json(scheme.to_json()))


@given(SCHEMES, SCHEMES)
def test_labels_tell_schemes_apart(a: Scheme, b: Scheme) -> None:
    assert (str(a) == str(b)) == (a == b)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bits", 0, "from 1 to 8"),
        ("bits", 9, "from 1 to 8"),
        ("bits", 3.5, "from 1 to 8"),
        ("bits", True, "from 1 to 8"),
        ("block", 0, "a number above 0, row, tensor, or flat:N"),
        ("block", "rows", "row, tensor"),
        ("block", "flat:0", "flat:N"),
        ("axis", "input", "in, out"),
        ("offset", "asym", "none, zero, float, mean"),
        ("scale", "fp8", "fp32, fp16, bf16"),
        ("scale", Scheme(scale="int8:256"), "cannot be quantized again"),
        ("scale", Scheme(axis="out"), "axis 'in'"),
        ("dtype", "", "is not known"),
        ("dtype", 4, "is not known"),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(SchemeError, match=says):
        Scheme(**{field: value})  # type: ignore[arg-type]


def test_one_word_schemes() -> None:
    assert parse_scheme("int8:64") == Scheme("int", 8, 64)
    assert parse_scheme("nf4:row") == Scheme("nf", 4, "row")
    assert parse_scheme("nf4") == Scheme("nf", 4, 64)
    with pytest.raises(SchemeError, match="TYPEBITS"):
        parse_scheme("four bits")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_and_keyed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "recipe.toml",
        'model = "m"\n[scheme]\ndtype = "nf"\nbits = 3\n[[overrides]]\nlayers = "*.0.*"\nkeep = true\n',
    )
    recipe = make_recipe(read_toml(path), path)
    assert recipe.scheme == Scheme("nf", 3)
    assert recipe.overrides[0].keep
    assert key(recipe) == key(make_recipe(recipe.to_json()))
    assert key(recipe) != key(recipe.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'model = "m"\nquantiser = "rtn"\n',
            r"line 2: a recipe has no key 'quantiser'; did you mean 'quantizer'",
        ),
        (
            'model = "m"\n[[overrides]]\nlayers = "x"\nkept = true\n',
            r"line 4: a recipe has no key 'overrides.0.kept'",
        ),
        ('model = "m"\n[scheme]\ndtipe = "nf"\n', "a scheme has no key 'dtipe'; did you mean 'dtype'"),
        ('model = "m"\n[scheme]\nbits = 12\n', "from 1 to 8"),
        ('model = "m"\nsearch = "maybe"\n', "line 2: search"),
        ("model = \n", "not TOML"),
        ("", "model"),
    ],
)
def test_bad_recipes_name_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "recipe.toml", text)
    with pytest.raises(RecipeError, match=says) as caught:
        make_recipe(read_toml(path), path)
    assert "recipe.toml" in str(caught.value)


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")
