"""What fracbit says of its outputs: fracbit.json in a folder; inside of one file, or beside it where it has no room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fracbit.checkpoint.folder import MANIFEST
from fracbit.checkpoint.formats.gguf_record import lone_file, record_of
from fracbit.records.files import read_json

if TYPE_CHECKING:
    from fracbit.checkpoint.source import Source


def beside(file: Path) -> Path:
    """The manifest of a file that holds none: model.gguf.fracbit.json."""
    return file.with_name(f"{file.name}.{MANIFEST}")


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of a folder, or of one file, says; empty where there is none. Raises `FormatError`."""
    if path.is_file():
        return {**(record_of(path) or {}), **_read(beside(path))}
    return _read(path / MANIFEST)


def manifest_of(source: Source) -> dict[str, Any]:
    """What is said of a source; of one file, by the folder around it only if that lists the file. Raises `FormatError`."""
    file = lone_file(source)
    if file is None:
        return _read(source.folder / MANIFEST)
    found = read_manifest(file)
    around = {} if found else _read(file.parent / MANIFEST)
    return around if file.name in around.get("files", {}) else found


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
