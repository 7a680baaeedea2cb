"""The pieces of a `tokenizer.model`, the file of sentencepiece, without its library: a message of protobuf.

Only one field of the file counts.

    file: field 1, repeated: piece          piece: field 1 text, field 2 score (fp32), field 3 kind

Ref: sentencepiece_model.proto of sentencepiece; the wire format of Protocol Buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fracbit.errors import FormatError

VARINT, EIGHT, MESSAGE, FOUR = 0, 1, 2, 5
NORMAL, USER_DEFINED = 1, 4


@dataclass(frozen=True)
class SentencePiece:
    """One piece of a vocabulary. `kind`: 1 normal, 2 unknown, 3 control, 4 of the user, 5 unused, 6 a byte."""

    text: bytes
    score: float
    kind: int


def read_pieces(path: Path) -> list[SentencePiece]:
    """The pieces in the order of their ids. Raises `FormatError` for another file."""
    content = path.read_bytes()
    try:
        pieces = [
            _piece(value) for field, value in _fields(content) if field == 1 and isinstance(value, bytes)
        ]
    except (IndexError, struct.error, ValueError) as error:
        raise FormatError(f"{path} is no model of sentencepiece ({error}); fetch it again") from error
    if not pieces:
        raise FormatError(f"{path} holds no pieces of sentencepiece; fetch it again")
    return pieces


def _piece(message: bytes) -> SentencePiece:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise ValueError("a piece has fields of other types")
    return SentencePiece(text, float(struct.unpack("<f", score)[0]), kind)


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Every field of a message: its number, and its bytes, or its value where it is a varint."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == MESSAGE:
            size, place = _varint(message, place)
        elif wire in (EIGHT, FOUR):
            size = 8 if wire == EIGHT else 4
        else:
            raise ValueError(f"a field of the wire type {wire}")
        if place + size > len(message):
            raise ValueError("it ends inside a field")
        yield number, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number in bytes of 7 bits, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
