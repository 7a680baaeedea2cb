"""What a GGUF file that stands by itself says of its making: two keys of its header, which llama.cpp passes over.

    fracbit.sha256     the hash of the whole file, with zeros in its own place
    fracbit.manifest   what fracbit.json says beside other exports, as JSON, spaces after it

The header is written before the tensors, so that room is kept in it and filled when the file is whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fracbit.checkpoint.place import GGUF
from fracbit.errors import FormatError
from fracbit.records.files import parse_json

if TYPE_CHECKING:
    from fracbit.checkpoint.source import Source

MAGIC = b"GGUF"
TEXT = 8  # GGUF's number of the type of texts
RECORD, HASH = "fracbit.manifest", "fracbit.sha256"
BLANK = "0" * 64
FRONT = 4096  # bytes in which both keys begin: they are the first after the architecture
PIECE = 1 << 20


def reserve(writer: Any, room: int) -> None:
    """Give a `writer` of the package `gguf` both keys, with room for so many letters of JSON."""
    writer.add_string(HASH, BLANK)
    writer.add_string(RECORD, " " * room)


def fill(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record and then the hash into the room of a file that is whole."""
    text = json.dumps(record).encode()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        start, size = _room(data, RECORD)
        if len(text) > size:
            raise FormatError(
                f"{path} keeps {size} bytes for its record, which takes {len(text)}; export again"
            )
        data[start : start + size] = text.ljust(size)
        start, size = _room(data, HASH)
        data[start : start + size] = _hash(data, start).encode()


def refill(path: Path, record: Mapping[str, Any]) -> None:
    """Write another record, no longer than the first, and the hash of changed bytes; nothing into a file that has neither."""
    if record_of(path) is not None:
        fill(path, record)


def record_of(path: Path) -> dict[str, Any] | None:
    """The record inside a GGUF file; None for a file of others. Raises `FormatError` for one that cannot be read."""
    with path.open("rb") as file:
        if path.suffix != GGUF or file.read(len(MAGIC)) != MAGIC:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start, size = _room(data, RECORD)
            text = data[start : start + size]
    return parse_json(text, f"the record in {path}") if text else None


def lone_file(source: Source) -> Path | None:
    """The GGUF file that a source is; None for other sources."""
    files = {info.file for info in source.on_disk.values() if info.start is not None}
    return Path(files.pop()) if len(files) == 1 else None


def unchanged(path: Path) -> bool | None:
    """Whether a GGUF file has the hash that it names; None where it names none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, size = _room(data, HASH)
        return data[start : start + size] == _hash(data, start).encode() if size else None


def _room(data: mmap.mmap, key: str) -> tuple[int, int]:
    """Where the text of a key begins and how long it is; nothing where the file has no such key."""
    head = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", TEXT)
    found = data.find(head, 0, FRONT)
    if found < 0:
        return 0, 0
    start = found + len(head) + 8
    return start, struct.unpack("<Q", data[start - 8 : start])[0]


def _hash(data: mmap.mmap, start: int) -> str:
    """The hash of a file whose own hash begins at `start`."""
    digest, end = hashlib.sha256(data[:start] + BLANK.encode()), start + len(BLANK)
    for first in range(end, len(data), PIECE):
        digest.update(data[first : first + PIECE])
    return digest.hexdigest()
