"""Records with named fields, and JSON lines as their simplest form.

A record's document is its field `text`, or, when it has none, the conversation in `messages` (role and
content) or `conversations` (from and value, as ShareGPT writes them); `field=` names another. Where the content of a message is
a list of parts, those of text are joined; images, sounds and other parts are left out, and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fracbit.data.raw import Message, RawText, RawTexts, decode_text, keep_first
from fracbit.errors import DataError
from fracbit.records.files import parse_json
from fracbit.records.text_source import TextSource, find_file

FIELDS = ("text", "messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

JOINT = "\n\n"
"""Separator of records that are read as one document; transformers' page on perplexity joins WikiText so."""

Record = Mapping[str, Any]


def read_jsonl(source: TextSource) -> RawTexts:
    """Read JSON lines; the hash covers the lines that were read.

    Raises: DataError naming the line that is broken, is not an object, lacks the field or is empty.
    """
    digest = hashlib.sha256()
    records = json_records(find_file(source), source, digest.update)
    return collect_records(source, records, digest.hexdigest)


def collect_records(
    source: TextSource, records: Iterable[tuple[str, Record]], digest: Callable[[], str]
) -> RawTexts:
    """Turn named records into documents. digest: called after the last record that is needed has been read.

    Raises: DataError naming the record that has no document, or an empty one.
    """
    left: Counter[str] = Counter()
    pieces = ((name, _document(record, source, name, left)) for name, record in records)
    if source.documents == "one":
        return _joined(source, pieces, digest)
    return replace(keep_first(source, pieces, digest), left=left)


def pick_field(names: Iterable[str], source: TextSource, where: str) -> str:
    """The field that holds the document. Raises: DataError when there is no such field."""
    names = list(names)
    wanted = FIELDS if source.field is None else (source.field,)
    for field in wanted:
        if field in names:
            return field
    raise DataError(
        f"{where}: there is no field {' or '.join(wanted)}; the fields are {', '.join(names) or 'none'}. "
        "Name one with ?field=NAME."
    )


def _joined(source: TextSource, pieces: Iterable[tuple[str, RawText]], digest: Callable[[], str]) -> RawTexts:
    texts: list[str] = []
    for name, piece in pieces:
        if not isinstance(piece, str):
            raise DataError(f"{source.location}, {name}: conversations cannot be joined; use documents=each.")
        texts.append(piece)
        if len(texts) == source.first:
            break
    if not any(text.strip() for text in texts):
        raise DataError(f"{source.location} holds no text.")
    return RawTexts((JOINT.join(texts),), ("all records",), digest())


def json_records(
    path: Path, source: TextSource, digest: Callable[[bytes], object]
) -> Iterator[tuple[str, Record]]:
    """The records of a file of JSON lines, each with its place; `digest` is given every line. Raises: DataError."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest(line)
            text = decode_text(line, f"{source.location}, line {number},", offset)
            offset += len(line)
            if text.strip():
                yield f"line {number}", parse_json(text, f"{source.location}, line {number},", DataError)


def _document(record: Record, source: TextSource, name: str, left: Counter[str]) -> RawText:
    """A record's text or conversation; `left` counts the parts of messages that are no text."""
    where = f"{source.location}, {name}"
    value = record[pick_field(record, source, where)]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        return tuple(_plain(_message(message, where), where, left) for message in value)
    raise DataError(
        f"{where}: the field holds {type(value).__name__}, neither a text nor a list of messages."
    )


def _message(message: Record, where: str) -> Message:
    """A message with role and content, from either spelling."""
    if "role" in message and "content" in message:
        return message
    if "from" in message and "value" in message:
        return {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise DataError(
        f"{where}: a message has the fields {', '.join(message)}; it needs role and content "
        "(or from and value)."
    )


def _plain(message: Message, where: str, left: Counter[str]) -> Message:
    """The message with its content as one text, where that is a list of parts."""
    content = message["content"]
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, Sequence) or not all(isinstance(part, (str, Mapping)) for part in content):
        raise DataError(
            f"{where}: the content of a message is {type(content).__name__}; it must be a text, or a list of parts such as "
            '{"type": "text", "text": "..."}.'
        )
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str) and isinstance(part, Mapping):
            left[str(part.get("type", "part without a type"))] += 1
    return {**message, "content": "".join(text for text in texts if isinstance(text, str))}
