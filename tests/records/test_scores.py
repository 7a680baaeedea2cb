"""Scores, losses and allocations survive JSON, and are refused for a model they do not belong to."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fracbit.errors import FormatError, OutputError, RecipeError, SchemeError
from fracbit.records.allocation import (
    Allocation,
    check_allocation,
    load_allocation,
    read_level,
    read_levels,
    save_allocation,
    uniform,
)
from fracbit.records.scheme import Scheme, parse_scheme
from fracbit.records.scores import Losses, Scores, check_scores, fingerprint, load_scores, save_json

NAMES = ("model.layers.0", "model.layers.1", "model.layers.2")
INT4, NF2 = Scheme(), Scheme("nf", 2, 32, "out", "none", "int8:256")

schemes = st.builds(
    Scheme,
    st.sampled_from(["int", "nf", "float:e3m0", "power:1/2", "power:0.4", "kmeans:row", "quantile"]),
    st.integers(1, 8),
    st.one_of(st.integers(1, 512), st.sampled_from(["row", "tensor", "flat:64"])),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["none", "zero", "float", "mean"]),
    st.sampled_from(["fp32", "fp16", "bf16", "int8:256"]),
)


@given(schemes)
def test_labels_are_read_back(scheme: Scheme) -> None:
    assert read_level(str(scheme)) == scheme


def test_without_a_block_it_is_64() -> None:
    assert read_level("int4") == read_level("int4/64") == parse_scheme("int4") == INT4
    assert read_level("power:1/23z out") == Scheme("power:1/2", 3, 64, "out", "zero")


def test_a_colon_is_a_slash() -> None:
    assert read_level("int4:64") == read_level("int4/64") == parse_scheme("int4:64") == INT4
    assert read_level("kmeans:row3:row") == Scheme("kmeans:row", 3, "row")


@pytest.mark.parametrize(
    "label", ["", "nf", "nf/64", "nf4/", "nf4/64 in", "nf12/64", "4/64", "nf4/64 out out"]
)
def test_other_text_is_no_label(label: str) -> None:
    with pytest.raises(SchemeError, match="not a scheme"):
        read_level(label)


def test_levels_are_separated_by_commas() -> None:
    assert read_levels("int4/64, nf2/32 out s=int8:256,float") == (INT4, NF2, None)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.floats(-1e9, 1e9), min_size=1))
def test_scores_survive_json(values: dict[str, float]) -> None:
    scores = Scores(values, "lim", "abc", "order", {"tokens": 5})
    assert Scores.from_json(scores.to_json()) == scores


def test_files_survive(tmp_path: Path) -> None:
    scores = Scores(dict.fromkeys(NAMES, 1.0), "zd", "abc")
    losses = Losses((INT4, NF2, None), dict.fromkeys(NAMES, (1.0, 2.0, 0.0)), "oracle", "abc")
    allocation = Allocation({"a": INT4, "b": None, "c": NF2, "d": INT4}, "abc", {"budget": 3.5}, ("a note",))
    for record in (scores, losses):
        save_json(record, tmp_path / "scores.json")
        assert load_scores(tmp_path / "scores.json") == record
    save_allocation(allocation, tmp_path / "allocation.json")
    assert load_allocation(tmp_path / "allocation.json") == allocation
    assert not list(tmp_path.glob("*.part"))


def test_order_is_by_importance_and_stable() -> None:
    assert Scores({"a": 1.0, "b": 3.0, "c": 3.0, "d": 2.0}, "lim", "").order() == ("b", "c", "d", "a")


def test_losses_give_the_worth_of_a_lift() -> None:
    losses = Losses((NF2, INT4), {"a": (5.0, 1.0), "b": (2.0, 1.5)}, "oracle", "m")
    assert losses.scores(0, 1).values == {"a": 4.0, "b": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_sorted_are_refused(value: float) -> None:
    with pytest.raises(RecipeError, match="finite"):
        Scores({"a": value}, "lim", "")
    with pytest.raises(RecipeError, match="finite"):
        Losses((INT4,), {"a": (value,)}, "oracle", "")


def test_ragged_and_empty_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 numbers for 1 schemes"):
        Losses((INT4,), {"a": (1.0, 2.0)}, "oracle", "")
    with pytest.raises(RecipeError, match="no layer"):
        Scores({}, "lim", "")


def test_scores_of_another_model_are_refused() -> None:
    scores = Scores(dict.fromkeys(NAMES, 1.0), "lim", "abc")
    check_scores(scores, NAMES, "abc")
    with pytest.raises(RecipeError, match=r"without model.layers.3"):
        check_scores(scores, (*NAMES, "model.layers.3"))
    with pytest.raises(RecipeError, match=r"unknown model.layers.2"):
        check_scores(scores, NAMES[:2])
    with pytest.raises(RecipeError, match="other weights"):
        check_scores(scores, NAMES, "abd")
    with pytest.raises(RecipeError, match="another model"):
        check_allocation(uniform(NAMES, INT4), NAMES[:2])


def test_fingerprints_tell_models_apart() -> None:
    layers = [("a", (4, 8)), ("b", (8, 4))]
    marks = {
        fingerprint(layers),
        fingerprint(layers[:1]),
        fingerprint(layers, b"x"),
        fingerprint([("a", (8, 4)), layers[1]]),
    }
    assert len(marks) == 4
    assert fingerprint(layers) == fingerprint(list(layers))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"scores": 9}', "version"),
        ('{"scores": 1}', "lacks the keys"),
        (
            '{"scores": 1, "method": "m", "model": "", "kind": "order", "values": {"a": "x"}}',
            "expected a number",
        ),
        (
            '{"scores": 1, "method": "m", "model": "", "kind": "order", "values": [1]}',
            "expected an object",
        ),
        (
            '{"scores": 1, "method": "m", "model": "", "kind": "order", "values": {"a": 1}, "protocol": [1]}',
            "protocol of scores",
        ),
        ('{"losses": 1, "method": 3, "model": "", "schemes": [], "rows": {}}', "expected a string"),
        ('{"losses": 1, "method": "m", "model": "", "schemes": [4], "rows": {}}', "object or null"),
        (
            '{"losses": 1, "method": "m", "model": "", "schemes": [null], "rows": {"a": 1}}',
            "array of numbers",
        ),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=says):
        load_scores(path)


def test_a_file_that_cannot_be_written_is_one_of_our_errors(tmp_path: Path) -> None:
    scores = Scores({"a": 1.0}, "lim", "")
    with pytest.raises(OutputError, match="is not a folder; make it first"):
        save_json(scores, tmp_path / "gone" / "scores.json")
    with pytest.raises(OutputError, match="is a folder; name a file"):
        save_json(scores, tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"allocation": 2}, "version"),
        ({"allocation": 1, "schemes": []}, "lacks the keys"),
        ({"allocation": 1, "schemes": [3], "layers": {}}, "expected an object"),
        ({"allocation": 1, "schemes": [], "layers": [0]}, "layers of allocation"),
        ({"allocation": 1, "schemes": [], "layers": {"a": 0}}, "has scheme number 0"),
    ],
)
def test_broken_allocations_say_what_is_wrong(data: dict[str, object], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        Allocation.from_json(data)
