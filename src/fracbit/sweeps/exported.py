"""Rows for other programs: Parquet or CSV by the ending of a file, and a frame of pandas."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fracbit.errors import OutputError
from fracbit.records.extras import check_extra
from fracbit.records.files import is_store, named_path
from fracbit.records.row import Row
from fracbit.sweeps.parquet import export_parquet, flat, import_parquet
from fracbit.sweeps.store import open_store

if TYPE_CHECKING:
    import pandas


def read_rows(store: str | Path) -> list[Row]:
    """All rows of a store (an SQLite file, postgresql://USER@HOST/NAME), or of Parquet: a file or a folder of them.

    Raises `OutputError`, `FormatError`.
    """
    place = str(store)
    if not is_store(place):
        raise OutputError(f"no store {place}; `fracbit sweep SWEEP --store {place}` makes one")
    if place.endswith(".parquet") or named_path(place, OutputError).is_dir():
        return import_parquet(Path(place))
    with open_store(place) as opened:
        return opened.rows()


def export_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as the file's ending says: .parquet, which can be imported again, or .csv. Raises `OutputError`."""
    check_ending(path)
    WRITERS[path.suffix](rows, named_path(path, OutputError))


def check_ending(path: Path) -> None:
    """Raises `OutputError` for a file whose ending names no format."""
    if path.suffix not in WRITERS:
        raise OutputError(
            f"rows cannot be written as {path.name!r}; its ending should be {' or '.join(WRITERS)}"
        )


def frame(rows: str | Path | Iterable[Row]) -> pandas.DataFrame:
    """Rows, or those of a store, as a frame of pandas with the columns of the store, a line a row. Raises as `read_rows`."""
    check_extra("a frame", "pandas", "frame", OutputError)
    import pandas

    found = read_rows(rows) if isinstance(rows, str | Path) else rows
    return pandas.DataFrame([flat(row) for row in found])


def _export_csv(rows: Sequence[Row], path: Path) -> None:
    """Numbers and text as they are, lists and empty values as JSON and nothing."""
    temporary = path.with_name(path.name + ".tmp")
    lines = [{name: _cell(value) for name, value in flat(row).items()} for row in rows]
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]) if lines else ["key"])
            writer.writeheader()
            writer.writerows(lines)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}") from error


def _cell(value: Any) -> Any:
    return json.dumps(list(value)) if isinstance(value, tuple | list) else value


WRITERS: Mapping[str, Callable[[Sequence[Row], Path], None]] = {
    ".parquet": export_parquet,
    ".csv": _export_csv,
}
