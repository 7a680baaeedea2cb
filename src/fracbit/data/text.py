"""Plain text: a file is one document, or each of its lines or paragraphs is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from fracbit.data.raw import RawTexts, decode_text, keep_first, read_bytes
from fracbit.records.text_source import TextSource

_GAP = re.compile(r"\n[ \t\r]*\n\s*")


def read_text(source: TextSource) -> RawTexts:
    """Read a text file (UTF-8). Raises: DataError for a missing or empty file, or one that is not UTF-8."""
    data = read_bytes(source)
    text = decode_text(data, source.location)
    return keep_first(source, _divide(text, source), hashlib.sha256(data).hexdigest)


def _divide(text: str, source: TextSource) -> Iterator[tuple[str, str]]:
    """Documents with their names. Blank lines separate documents and do not count as empty ones."""
    if source.documents == "one":
        yield "the whole file", text
    elif source.documents == "line":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"line {number}", line
    else:
        for number, paragraph in enumerate(_GAP.split(text), 1):
            if paragraph.strip():
                yield f"paragraph {number}", paragraph.strip("\n")
