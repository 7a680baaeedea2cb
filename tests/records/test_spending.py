"""`Spending`: sizes as people write them, one budget at a time, and terms that fit together."""

from dataclasses import fields
from pathlib import Path

import pytest

from fracbit.errors import BudgetError, DataError, FracbitError, RecipeError, SchemeError
from fracbit.records.allocation import read_levels
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores, save_json
from fracbit.records.sizes import read_size
from fracbit.records.spending import BUDGETS, LEVELS, Spending, check_terms


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.2GB", 1_200_000_000),
        ("800 MiB", 800 * 2**20),
        ("5kb", 5000),
        ("7", 7),
        ("6GiB", 6 * 2**30),
        (".5m", 500_000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3GB", "4 bits", "0", "nan"])
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(BudgetError):
        read_size(text)


@pytest.mark.parametrize("asked", [{"average_bits": 3.0, "size": 5}, {"size": "1GB", "fits": "2GB"}])
def test_one_budget_at_a_time(asked: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="exactly one"):
        Spending(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [field.name for field in fields(Spending)])
def test_terms_without_a_budget_are_refused(name: str) -> None:
    """Every term: one that were forgotten here would be ignored without a word."""
    others = {
        "average_bits": 3.0, "size": "1GB", "fits": 10**9, "context": 64, "batch": 2, "preset": "best", "levels": "int4/64",
        "score": "zd", "text": "a.txt", "held_out": "a.txt", "granularity": "block", "fused": True, "solver": "order",
        "samples": 4, "length": 16, "engine": "vllm",
    }  # fmt: skip
    if name in BUDGETS:
        assert Spending(**{name: others[name]}).asked  # type: ignore[arg-type]
    elif name in ("preset", "engine"):
        assert not Spending(**{name: others[name]}).asked  # type: ignore[arg-type]
    else:
        with pytest.raises(FracbitError, match="budget"):
            Spending(**{name: others[name]})  # type: ignore[arg-type]


def test_nothing_is_asked_for_by_default() -> None:
    assert not Spending().asked
    assert Spending().schemes == read_levels(LEVELS)


@pytest.mark.parametrize(
    ("terms", "error", "says"),
    [
        ({"solver": "simplex"}, RecipeError, "known: exact, order"),
        ({"granularity": "row"}, RecipeError, "known: block, linear"),
        ({"text": "a.txt", "held_out": "a.txt"}, RecipeError, "hold out another text"),
        ({"levels": "nf/64"}, SchemeError, "not a scheme"),
        ({"levels": ("nf4/64", 3)}, SchemeError, "3 is not a scheme"),
        ({"average_bits": "many"}, BudgetError, "average_bits is 'many'; it must be a number"),
        ({"samples": 0}, RecipeError, "spending.samples is 0; .*at least 1"),
        ({"length": 1}, RecipeError, "spending.length is 1; .*at least 2"),
        ({"average_bits": None, "size": "much"}, BudgetError, "write a number and a unit"),
        ({"average_bits": None, "fits": 0}, BudgetError, "less than a byte"),
        ({"preset": "fats"}, RecipeError, "did you mean 'fast'"),
        ({"preset": "best", "fused": True}, RecipeError, "leave out fused"),
    ],
)
def test_terms_that_cannot_be_met(terms: dict[str, object], error: type[FracbitError], says: str) -> None:
    with pytest.raises(error, match=says):
        Spending(**{"average_bits": 3.5, **terms})  # type: ignore[arg-type]


def test_levels_and_scores_may_be_the_things_themselves(tmp_path: Path) -> None:
    levels = (Scheme(bits=2), None)
    assert Spending(size=1000, levels=("int2/64", "float")).schemes == levels
    assert Spending(size=1000, levels=(Scheme(bits=2), "float")).schemes == levels
    scores = Scores({"a": 1.0}, "lim", "m")
    asked = Spending(size=1000, levels=levels, score=scores)
    assert asked.schemes == levels
    assert asked.size_bytes == 1000
    assert asked.named_score() is scores
    save_json(scores, tmp_path / "lim.json")
    assert Spending(average_bits=3, score=str(tmp_path / "lim.json")).named_score() == scores
    assert Spending(average_bits=3, score="zd").named_score() == "zd"


def test_a_recipe_and_a_budget_that_do_not_go_together(tmp_path: Path) -> None:
    there = str(tmp_path / "there.txt")
    Path(there).write_text("text")
    plain, budget = Recipe(model="m"), Spending(average_bits=3.5, text=there)
    check_terms(plain, budget)
    check_terms(Recipe(model="m", scheme=Scheme()), Spending())
    check_terms(Recipe(model="m", calibration=Calibration(texts=("generated", there))), budget)
    with pytest.raises(RecipeError, match="the scheme int4/64, and a budget chooses"):
        check_terms(Recipe(model="m", scheme=Scheme()), budget)
    for terms in ({"text": "gone.txt"}, {"held_out": "gone.txt"}):
        with pytest.raises(DataError, match=r"gone\.txt: no such file"):
            check_terms(plain, Spending(average_bits=3.5, **terms))
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        check_terms(Recipe(model="m", calibration=Calibration(texts=(there, "gone.txt"))), Spending())
    with pytest.raises(DataError, match="this text measures losses"):
        check_terms(plain, Spending(average_bits=3.5, held_out="generated"))
