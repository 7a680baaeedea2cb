"""What readers return before there are tokens: texts, conversations or ids, and the hash of the bytes read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fracbit.errors import DataError
from fracbit.records.text_source import TextSource, find_file

Message = Mapping[str, Any]
RawText = str | Sequence[Message]

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RawTexts:
    """Documents of text.

    pieces: texts or conversations. names: the place of each ("line 3"). skipped: number of empty ones left out. left: how many
    parts of messages that are no text were left out, by their type. notes: what else was done to them.
    """

    pieces: tuple[RawText, ...]
    names: tuple[str, ...]
    sha256: str
    skipped: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RawIds:
    """Documents of ids [ids] each, in the integer type of the file."""

    documents: tuple[np.ndarray, ...]
    sha256: str


def read_bytes(source: TextSource) -> bytes:
    """All bytes of a source's file. Raises: DataError when it is missing or unreadable."""
    path = find_file(source)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{source.location} cannot be read: {error.strerror}.") from error


def decode_text(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 text without its byte order mark. offset: of data[0] in the file, for the message.

    Raises: DataError naming the byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start} "
            f"({error.reason}). Convert it, for example with iconv -f LATIN1 -t UTF-8."
        ) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts that do not come from one file: the length in bytes and the UTF-8 of each."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def keep_first(
    source: TextSource, pieces: Iterable[tuple[str, RawText]], digest: Callable[[], str]
) -> RawTexts:
    """Collect the first `first=` of named documents; the rest stays unread. digest: called after the last one.

    Raises: DataError naming an empty document, unless the source skips them.
    """
    names: list[str] = []
    kept: list[RawText] = []
    skipped = 0
    for name, piece in pieces:
        if _empty(piece) and source.empty == "error":
            raise DataError(f"{source.location}, {name}: an empty document. Remove it, or add ?empty=skip.")
        if _empty(piece):
            skipped += 1
            continue
        names.append(name)
        kept.append(piece)
        if len(kept) == source.first:
            break
    return RawTexts(tuple(kept), tuple(names), digest(), skipped)


def _empty(piece: RawText) -> bool:
    return not (piece.strip() if isinstance(piece, str) else piece)
