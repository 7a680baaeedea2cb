"""Text that comes with fracbit, for people without a text of their own, and beside texts of a single kind.

It was written for fracbit: prose, code, many languages, conversations. A record of texts/*.jsonl is a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fracbit.data.encode import render_chat
from fracbit.data.lines import Record, collect_records, json_records
from fracbit.data.raw import Message, RawText, RawTexts, hash_file, hash_texts
from fracbit.errors import DataError
from fracbit.records.text_source import BUILTIN, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = Path(__file__).with_name("texts")


def read_builtin(source: TextSource) -> RawTexts:
    """Read one part (`builtin:chats`), or all but the one to judge by."""
    paths = [TEXTS / f"{part}.jsonl" for part in (BUILTIN if source.split is None else (source.split,))]

    def records() -> Iterator[tuple[str, Record]]:
        for path in paths:
            yield from json_records(path, source, lambda line: None)

    return collect_records(source, records(), lambda: hash_texts(map(hash_file, paths)))


def as_taken(raw: RawTexts, tokenizer: PreTrainedTokenizerBase) -> RawTexts:
    """The documents as a chat template takes them: where it must be so, without a system message, or as plain text."""
    pieces = tuple(piece if isinstance(piece, str) else _taken(piece, tokenizer) for piece in raw.pieces)
    written = sum(isinstance(piece, str) for piece in pieces) - sum(
        isinstance(piece, str) for piece in raw.pieces
    )
    why = "refuses them" if tokenizer.chat_template else "is missing"
    notes = (f"{written} conversations are read as plain text: the chat template {why}",) if written else ()
    return replace(raw, pieces=pieces, notes=notes)


def _taken(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> RawText:
    for form in (messages, _without_system(messages)):
        try:
            render_chat(form, tokenizer, "builtin")
        except DataError:
            continue
        return form
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    """The system message at the head of the first question: some templates know no such role."""
    first, *rest = messages
    if first["role"] != "system" or not rest:
        return messages
    return ({**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:])
