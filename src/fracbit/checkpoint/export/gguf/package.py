"""The package `gguf` of llama.cpp (the extra `fracbit[gguf]`), which is imported when a file is written."""

from __future__ import annotations

from typing import Any

from fracbit.errors import FormatError
from fracbit.records.extras import install


def package() -> Any:
    """The package `gguf`. Raises `FormatError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FormatError(f"writing a GGUF file needs the package gguf: {install('gguf')}") from error
    return gguf
