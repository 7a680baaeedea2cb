"""The text that comes with fracbit: every part, under every kind of chat template, for any number of samples."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from fracbit.data import parse_source, read_calibration, read_documents, shared_documents
from fracbit.data.builtin import TEXTS
from fracbit.errors import DataError
from fracbit.records.text_source import BUILTIN
from texts import byte_tokenizer

VOCABULARY = 259
REFUSES = "{{ raise_exception('no conversations') }}"
TAKES = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def records(part: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (TEXTS / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("part", BUILTIN)
def test_every_part_is_read(part: str, tokenizer: PreTrainedTokenizerFast) -> None:
    found = read_documents(f"builtin:{part}", tokenizer, VOCABULARY)
    assert len(found.documents) == len(records(part)) > 20
    assert found.count > 30_000


def test_the_whole_is_its_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = read_documents("builtin", tokenizer, VOCABULARY)
    parts = [read_documents(f"builtin:{part}", tokenizer, VOCABULARY) for part in BUILTIN]
    assert whole.count == sum(part.count for part in parts)
    assert len({part.sha256 for part in (whole, *parts)}) == 1 + len(parts)


@pytest.mark.parametrize(
    ("template", "opens", "noted"),
    [(None, "User: ", "is missing"), (REFUSES, "User: ", "refuses them"), (TAKES, "<user>", "")],
)
def test_conversations_without_a_template_are_plain_text_and_noted(
    template: str | None, opens: str, noted: str
) -> None:
    tokenizer = byte_tokenizer(bos=True, template=template)
    found = read_documents("builtin:chats", tokenizer, VOCABULARY)
    first = next(r["messages"] for r in records("chats") if r["messages"][0]["role"] == "user")
    assert any(
        tokenizer.decode(document, skip_special_tokens=True).startswith(opens + first[0]["content"])
        for document in found.documents
    )
    assert [note for note in found.notes if noted in note] if noted else not found.notes


def test_a_template_without_a_system_role_gets_it_in_the_question(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = read_documents("builtin:chats", chat_tokenizer, VOCABULARY)
    first = next(r["messages"] for r in records("chats") if r["messages"][0]["role"] == "system")
    wanted = f"<user>{first[0]['content']}\n\n{first[1]['content']}<assistant>"
    written = [chat_tokenizer.decode(document, skip_special_tokens=True) for document in found.documents]
    assert any(text.startswith(wanted) for text in written)
    assert not found.notes


def test_there_are_always_enough_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    held = read_documents("builtin:code", tokenizer, VOCABULARY).count
    drawn = read_calibration(["builtin:code"], tokenizer, VOCABULARY, samples=8, length=held // 3, seed=0)
    assert drawn.ids.shape == (8, held // 3)
    assert len({tuple(row.tolist()) for row in drawn.ids}) == 8, "another order each time"


def test_the_part_to_judge_by_is_no_part_of_the_others(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = read_documents("builtin", tokenizer, VOCABULARY)
    judge = read_documents("builtin:held-out", tokenizer, VOCABULARY)
    assert len(judge.documents) == len(records("held-out"))
    assert judge.count > 8_000
    assert shared_documents(judge, whole, run=100) == 0


def test_an_unknown_part() -> None:
    with pytest.raises(DataError, match="has the parts chats, code, prose, languages, held-out, not 'poems'"):
        parse_source("builtin:poems")


def test_samples_are_shared_between_the_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = read_calibration(["builtin"], tokenizer, VOCABULARY, samples=20, length=64, seed=0)
    assert {each["source"]: each["samples"] for each in drawn.sources} == {
        "builtin:chats": 10,
        "builtin:code": 4,
        "builtin:prose": 3,
        "builtin:languages": 3,
    }
