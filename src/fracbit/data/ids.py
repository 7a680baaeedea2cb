"""Raw token ids: `.u16` and `.u32` (little-endian, nothing else in the file) and `.npy` (integers, 1-D or
2-D).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fracbit.data.raw import RawIds, hash_file
from fracbit.errors import DataError, blamed_on
from fracbit.records.text_source import TextSource, find_file

WIDTHS = {"u16": "<u2", "u32": "<u4"}


def read_ids(source: TextSource) -> RawIds:
    """Read a file of ids: one document, documents of `length=` ids, or the rows of a 2-D array.

    Raises: DataError for a file that is cut off, empty, not an array of integers, or not a whole number of
    documents.
    """
    path = find_file(source)
    with blamed_on(f"{source.location} cannot be read", DataError):
        ids = _array(path, source) if source.format == "npy" else _flat(path, source)
        # A map is of no use later: whoever cuts the file meanwhile would end this process.
        rows = np.array(_rows(ids, source)[: source.first])
        return RawIds(tuple(rows), hash_file(path))


def _flat(path: Path, source: TextSource) -> np.ndarray:
    kind = np.dtype(WIDTHS[source.format])
    size = path.stat().st_size
    if size % kind.itemsize:
        raise DataError(
            f"{source.location} has {size} bytes, not a whole number of {kind.itemsize}-byte ids: "
            "it is cut off, or has another format."
        )
    return np.memmap(path, dtype=kind, mode="r") if size else np.zeros(0, kind)


def _array(path: Path, source: TextSource) -> np.ndarray:
    try:
        # Mapped: a header that claims more than the file holds is refused, and `first` reads no more than it says.
        ids = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{source.location} cannot be read as a .npy array: {error}") from error
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise DataError(f"{source.location} holds {kind}; ids are integers, [ids] or [documents, ids].")
    return ids


def _rows(ids: np.ndarray, source: TextSource) -> np.ndarray:
    """Documents as the rows of a matrix [documents, ids]."""
    if ids.size == 0:
        raise DataError(f"{source.location} holds no ids.")
    if ids.ndim == 2 and source.length is not None:
        raise DataError(f"{source}: the array has documents of {ids.shape[1]} ids already; leave length out.")
    if ids.ndim == 2:
        return ids
    length = source.length or len(ids)
    if len(ids) % length:
        raise DataError(
            f"{source}: {len(ids)} ids are not a whole number of documents of {length}: the last would have "
            f"{len(ids) % length}."
        )
    return ids.reshape(-1, length)  # [documents, length]
