"""The package `gguf` of llama.cpp (the extra `fracbit[gguf]`), which is imported when a file is written."""

from __future__ import annotations

from typing import Any

from fracbit.errors import FormatError
from fracbit.records.extras import check_extra


def package() -> Any:
    """The package `gguf`. Raises `FormatError` where it is not installed."""
    check_extra("writing a GGUF file", "gguf", "gguf", FormatError)
    import gguf

    return gguf
