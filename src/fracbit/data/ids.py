"""Raw token ids: `.u16` and `.u32` (little-endian, nothing else in the file) and `.npy` (integers, 1-D or
2-D).
"""

from __future__ import annotations

import hashlib
import io

import numpy as np

from fracbit.data.raw import RawIds, read_bytes
from fracbit.errors import DataError
from fracbit.records.text_source import TextSource

WIDTHS = {"u16": "<u2", "u32": "<u4"}


def read_ids(source: TextSource) -> RawIds:
    """Read a file of ids: one document, documents of `length=` ids, or the rows of a 2-D array.

    Raises: DataError for a file that is cut off, empty, not an array of integers, or not a whole number of
    documents.
    """
    data = read_bytes(source)
    ids = _array(data, source) if source.format == "npy" else _flat(data, source)
    if ids.size == 0:
        raise DataError(f"{source.location} holds no ids.")
    rows = _rows(ids, source)[: source.first]
    return RawIds(tuple(rows), hashlib.sha256(data).hexdigest())


def _flat(data: bytes, source: TextSource) -> np.ndarray:
    kind = np.dtype(WIDTHS[source.format])
    if len(data) % kind.itemsize:
        raise DataError(
            f"{source.location} has {len(data)} bytes, not a whole number of {kind.itemsize}-byte ids: "
            "it is cut off, or has another format."
        )
    return np.frombuffer(data, dtype=kind)


def _array(data: bytes, source: TextSource) -> np.ndarray:
    try:
        ids = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{source.location} cannot be read as a .npy array: {error}") from error
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise DataError(f"{source.location} holds {kind}; ids are integers, [ids] or [documents, ids].")
    return ids


def _rows(ids: np.ndarray, source: TextSource) -> np.ndarray:
    """Documents as the rows of a matrix [documents, ids]."""
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
