"""Questions cut from text: true to it, all different, the same for a seed; YAML that names its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fracbit.errors import DataError, OutputError
from fracbit.evaluation import continuation_items, write_continuation, write_lambada

TEXTS = [" ".join(f"{name}{n}" for n in range(200)) for name in "abc"] + ["one\n\ttwo  three\nfour " * 30]


def test_items_are_true_to_the_text() -> None:
    items = continuation_items(TEXTS, items=20, context_words=10, choice_words=3, seed=0)
    for item in items:
        assert len(item.choices) == len(set(item.choices)) == 4
        true = item.choices[item.answer]
        assert any(item.context + true in text for text in TEXTS), "the white space between them is kept"
        assert (len(item.context.split()), {len(choice.split()) for choice in item.choices}) == (10, {3})
        assert all(choice[0].isspace() and not choice[-1].isspace() for choice in item.choices)
    assert len({item.answer for item in items}) == 4, "the true one stands anywhere"


def test_wrong_choices_are_about_as_long_as_the_true_one() -> None:
    text = " ".join("x" * (1 + n % 40) + str(n) for n in range(4000))
    items = continuation_items([text], items=50, context_words=5, choice_words=1, seed=0)
    apart = [abs(len(choice) - len(item.choices[item.answer])) for item in items for choice in item.choices]
    assert sum(apart) / len(apart) < 2, "words of 2 to 44 letters differ by 13 on average"


def test_the_seed_decides() -> None:
    first, again, other = (
        continuation_items(TEXTS, items=8, context_words=10, choice_words=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("texts", "items", "complaint"),
    [
        (TEXTS, 500, "hold .* pieces of 10 \\+ 3 words, and 500 are needed"),
        ([], 1, "hold 0 pieces"),
        (["same " * 500], 4, "fewer than 4 different continuations"),
        (TEXTS, 0, "at least 1"),
    ],
)
def test_too_little_text(texts: list[str], items: int, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        continuation_items(texts, items=items, context_words=10, choice_words=3, seed=0)


def test_files(tmp_path: Path) -> None:
    task = write_continuation(TEXTS, tmp_path / 'a "b"', items=5, context_words=10, choice_words=3)
    assert task.name == "continuation"
    data = task.path.parent / "continuation.jsonl"
    assert json.dumps(str(data)) in task.path.read_text()
    assert [set(json.loads(line)) for line in data.read_text().splitlines()] == [
        {"context", "choices", "answer"}
    ] * 5


def test_lambada(tmp_path: Path) -> None:
    source = tmp_path / "passages.jsonl"
    source.write_text('{"text": "a b c"}\n{"text": "d e"}\n')
    task = write_lambada(source, tmp_path / "tasks")
    assert (task.name, task.path.parent.name) == ("lambada_local", "tasks")
    assert str(source) in task.path.read_text()
    for line, complaint in (
        ('{"text": "one"}', "line 3: a passage"),
        ("{", "line 3 is not JSON"),
        ("[]", "line 3"),
    ):
        (tmp_path / "bad.jsonl").write_text(source.read_text() + line)
        with pytest.raises(DataError, match=complaint):
            write_lambada(tmp_path / "bad.jsonl", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        write_lambada(tmp_path / "absent.jsonl", tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        write_continuation(TEXTS, tmp_path / "file" / "tasks", items=5, context_words=10, choice_words=3)
