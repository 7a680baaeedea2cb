"""Small files that a user names: JSON objects and text, read with clear errors and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fracbit.errors import FormatError, OutputError

JSON_TYPES: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}


def check_file(path: Path) -> None:
    """Refuse, before any work, a file that could not be written. Raises `OutputError`."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; make it first")


def write_text(text: str, path: Path) -> None:
    """Write a text file, under a temporary name first. Raises `OutputError`."""
    check_file(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write an object as readable JSON. Raises `OutputError`."""
    write_text(json.dumps(value, indent=1) + "\n", path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `FormatError` when it cannot be read or is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def check_keys(data: Mapping[str, Any], what: str, version: int, keys: Mapping[str, type]) -> None:
    """Refuse a record of another version, without a key, or with a value of another type. Raises `FormatError`."""
    if data.get(what) != version:
        raise FormatError(f"expected {what} of version {version}, got {data.get(what)!r}; make the file anew")
    missing = [key for key in keys if key not in data]
    if missing:
        raise FormatError(f"the file of {what} lacks the keys {', '.join(missing)}; make it anew")
    for key, kind in keys.items():
        if not isinstance(data[key], kind):
            expected = JSON_TYPES[kind]
            raise FormatError(f"{key} of {what} is {str(data[key])[:40]!r}, expected {expected}")
