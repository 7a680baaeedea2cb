"""Weight files of one checkpoint: which tensor goes into which file, under the names that transformers uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from fracbit.checkpoint.output import write_json
from fracbit.checkpoint.source import INDEX, SINGLE
from fracbit.errors import OutputError

T = TypeVar("T")


def cut_shards(items: Iterable[T], bytes_of: Callable[[T], int], limit: int) -> dict[str, list[T]]:
    """The items in files of at most `limit` bytes, in their order; a larger item has a file of its own."""
    parts: list[list[T]] = [[]]
    size = 0
    for item in items:
        if parts[-1] and size + bytes_of(item) > limit:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += bytes_of(item)
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}


def write_index(folder: Path, places: Mapping[str, str], total_bytes: int) -> None:
    """Write the index that names the file of every tensor; none where all are in one file."""
    if len(set(places.values())) > 1:
        weight_map = dict(sorted(places.items()))
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def check_apart(folder: Path, source: Path) -> None:
    """Refuse to write the output into the folder that it is made from. Raises `OutputError`."""
    if folder.exists() and folder.resolve() == source.resolve():
        raise OutputError(f"{folder} is the model itself; name another folder for the output")
