"""Small files that a user names: JSON objects and text, read with clear errors and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fracbit.errors import FormatError, FracbitError, OutputError

DEEPEST = 100
SHOWN = 60  # letters of a name in a message
JSON_TYPES: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}


def named_path(path: str | Path, error: type[FracbitError]) -> Path:
    """A place as the user names it. Raises `error` for a name that no file system can hold."""
    try:
        found = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
        return found
    except (OSError, ValueError, RuntimeError) as found_out:
        shown = str(path) if len(str(path)) <= SHOWN else f"{str(path)[:SHOWN]}..."
        reason = found_out.strerror if isinstance(found_out, OSError) else found_out
        raise error(f"{shown!r} is no name of a file or folder ({reason}); name another one") from found_out


def is_store(where: str) -> bool:
    """Whether there may be a store: a URL, or a file that is there. Raises `OutputError` for a name that cannot be."""
    return "://" in where or named_path(where, OutputError).exists()


def check_file(path: Path) -> None:
    """Refuse, before any work, a file that could not be written. Raises `OutputError`."""
    path = named_path(path, OutputError)
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


def read_json(path: Path, error: type[FracbitError] = FormatError) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` when it cannot be read or is something else."""
    try:
        text = path.read_bytes()
    except OSError as found:
        raise error(f"{path} cannot be read: {found.strerror}") from found
    return parse_json(text, path, error)


def parse_json(text: str | bytes, where: object, error: type[FracbitError] = FormatError) -> dict[str, Any]:
    """The JSON object that a text at `where` holds. Raises `error` for anything else, and for what is nested too deeply."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as found:
        reason = "it is nested too deeply" if isinstance(found, RecursionError) else found
        raise error(f"{where} is not JSON: {reason}") from found
    if not isinstance(data, dict):
        raise error(f"{where} holds a {type(data).__name__}, expected a JSON object")
    if is_deep(data):
        raise error(f"{where} is nested in more than {DEEPEST} levels, which no file of settings is")
    return data


def is_deep(data: object) -> bool:
    """Whether a value of JSON or TOML is nested in more than `DEEPEST` levels: functions that walk through it would not end."""
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


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
