"""Schemes and recipes: what cannot be is refused with the remedy; JSON round trips; keys name contents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fracbit.errors import RecipeError, SchemeError
from fracbit.records.calibration import Calibration
from fracbit.records.outliers import Outliers
from fracbit.records.recipe import Override, Recipe, key, make_recipe, read_toml, recipe_toml
from fracbit.records.row import Evaluation, Run
from fracbit.records.scheme import Scheme, parse_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMES = st.builds(
    Scheme,
    st.sampled_from(["int", "nf", "float:e3m0", "power:1/2", "kmeans:row"]),
    st.integers(1, 8),
    st.one_of(st.integers(1, 4096), st.sampled_from(["row", "tensor", "flat:64"])),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["none", "zero", "float", "mean"]),
    st.sampled_from(["fp32", "fp16", "bf16", "int8:256"]),
)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
OPTIONAL = st.one_of(st.none(), SCHEMES)
CALIBRATIONS = st.builds(
    Calibration,
    texts=st.lists(WORDS, max_size=3),
    samples=st.integers(1, 999),
    chain=st.sampled_from(["quantized", "float"]),
    transforms=st.lists(st.sampled_from(["smooth", "rotate"]), max_size=2),
    inputs=st.one_of(st.none(), WORDS),
    tweak=st.sampled_from(["none", "closed"]),
    rate=st.floats(1e-30, 1e30),
)
RECIPES = st.builds(
    Recipe,
    model=WORDS,
    revision=st.one_of(st.none(), WORDS),
    trust_remote_code=st.booleans(),
    scheme=SCHEMES,
    embeddings=OPTIONAL,
    head=OPTIONAL,
    quantizer=st.sampled_from(["rtn", "gptq"]),
    search=st.booleans(),
    outliers=st.one_of(st.none(), st.builds(Outliers, chosen=st.just("proxy"), share=st.floats(1e-9, 0.99))),
    calibration=st.one_of(st.none(), CALIBRATIONS),
    overrides=st.lists(st.builds(Override, layers=WORDS, keep=st.booleans(), scheme=OPTIONAL), max_size=3),
    seed=st.integers(0, 2**40),
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
        ("block", 0, "known: row, tensor, a number above 0, flat:N"),
        ("block", "rows", "row, tensor"),
        ("block", "flat:0", "flat:N"),
        ("block", "0x16", "ROWSxCOLUMNS"),
        ("axis", "input", "in, out"),
        ("offset", "asym", "known: float, mean, none, zero"),
        ("scale", "fp8", "Known: bf16, e8m0, fp16, fp32, or TYPEBITS:BLOCK"),
        ("scale", Scheme(scale="int8:256"), "cannot be quantized again"),
        ("scale", Scheme(axis="out"), "axis 'in'"),
        ("dtype", "", "unknown"),
        ("dtype", 4, "unknown"),
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
    with pytest.raises(SchemeError, match="quantizes nothing"):
        parse_scheme("float")


@given(SCHEMES)
def test_a_recipe_takes_the_word_of_a_scheme(scheme: Scheme) -> None:
    word: Any = str(scheme)
    made = Recipe(model="m", scheme=word, head=word, overrides=(Override(layers="*", scheme=word),))
    assert made == Recipe(
        model="m", scheme=scheme, head=scheme, overrides=(Override(layers="*", scheme=scheme),)
    )
    assert (
        make_recipe(
            {"model": "m", "scheme": word, "head": word, "overrides": [{"layers": "*", "scheme": word}]}
        )
        == made
    )


@given(RECIPES, st.lists(WORDS, max_size=2))
def test_a_recipe_survives_toml(recipe: Recipe, notes: list[str]) -> None:
    read = make_recipe(tomllib.loads(recipe_toml(recipe, notes)))
    recipe = recipe.model_copy(update={"trust_remote_code": False})
    assert read == recipe
    assert key(read) == key(recipe)


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
        ('model = "m"\ntrust_remote_code = true\n', "line 2: .*not taken from a file.*--trust-remote-code"),
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


def test_a_file_does_not_say_whether_code_is_trusted() -> None:
    trusted = Recipe(model="m", trust_remote_code=True)
    assert "trust" not in recipe_toml(trusted)
    assert Recipe(**trusted.to_json()).trust_remote_code, "the record of a run does"


def test_calibrated_recipes_search_unless_they_say_otherwise() -> None:
    texts = Calibration(texts=("t",))
    assert not Recipe(model="m").search
    assert Recipe(model="m", calibration=texts).search
    assert "search" not in Recipe(model="m", calibration=texts).model_fields_set  # a preset may choose
    off = Recipe(model="m", calibration=texts, search=False)
    assert not off.search
    # What is written says so, and reads back as it was.
    for recipe in (off, Recipe(model="m", calibration=texts), Recipe(model="m")):
        assert make_recipe(tomllib.loads(recipe_toml(recipe))) == recipe
        assert Recipe.model_validate(recipe.to_json()) == recipe
    # A recipe without search has the key that it had before.
    assert (
        key(off) != key(Recipe(model="m", calibration=texts)) == key(off.model_copy(update={"search": True}))
    )
    # Records that exist already are not changed, wherever they go.
    copied = Recipe(model="m").model_copy(update={"calibration": texts})
    assert Run(recipe=copied, evaluation=Evaluation(text="t")).recipe == copied
    assert not copied.search


@pytest.mark.parametrize(
    "words",
    [{"seed": 10**30}, {"seed": -(2**63)}, {"calibration": {"texts": ["a.txt"], "samples": 2**62}}],
    ids=str,
)
def test_numbers_are_of_64_bits(words: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"it should be less than 2\^62"):
        Recipe(model="m", **words)  # type: ignore[arg-type]
