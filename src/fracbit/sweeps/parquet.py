"""Rows as one Parquet file, for notebooks and for moving a study to another store. Exported rows can be read back.

Plain columns as in the store, lists for the windows, JSON for nested records. Not every setting has a column: `run` holds
the whole run as JSON without default values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from fracbit.errors import FormatError, OutputError
from fracbit.records.extras import check_extra
from fracbit.records.row import Row, run_key
from fracbit.sweeps.store import columns_of

NESTED = ("accuracies", "versions", "notes")  # JSON in a column
LISTS = ("window_nll", "window_tokens")
ALSO = ("family", "weights", "evaluation_seconds")  # fields of a row that the store keeps only in its record


def export_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write rows. Raises `OutputError` when pyarrow is missing or the file cannot be written."""
    pyarrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    temporary = path.with_name(path.name + ".tmp")
    try:
        table = pyarrow.Table.from_pylist([flat(row) for row in rows])
        parquet.write_table(table, temporary, compression="zstd", compression_level=19)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}") from error


def import_parquet(path: Path) -> list[Row]:
    """Read rows that `export_parquet` wrote: one file, or a folder of them.

    Raises `OutputError` when the file cannot be read, `FormatError` when it holds something else.
    """
    parquet, arrow = _library("pyarrow.parquet"), _library("pyarrow")
    try:
        lines = parquet.read_table(path).to_pylist()
    except arrow.ArrowInvalid as error:
        raise FormatError(f"{path} is not a Parquet file: {error}") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error}") from error
    return [_row(line, path) for line in lines]


def flat(row: Row) -> dict[str, Any]:
    """A row as columns: those of the store, the run as JSON, and lists."""
    columns = {name: value for name, value in columns_of(row).items() if name != "record"}
    run = row.run.model_dump_json(exclude_defaults=True)
    return columns | {"run": run} | {name: getattr(row, name) for name in (*ALSO, *LISTS)}


def _row(line: Mapping[str, Any], path: Path) -> Row:
    missing = {"key", "run", "status", "text_sha256", *NESTED, *LISTS, *ALSO} - line.keys()
    if missing:
        raise FormatError(
            f"{path} lacks the columns {sorted(missing)}: write it with `fracbit sweep --export FILE.parquet`"
        )
    fields = {name: line[name] for name in Row.model_fields if name in line and name not in ("run", *NESTED)}
    try:
        nested = {name: json.loads(line[name]) for name in ("run", *NESTED)}
        recipe = nested["run"].get("recipe") if isinstance(nested["run"], dict) else None
        if isinstance(recipe, dict):
            recipe.setdefault("search", False)  # left out as it is the field's default
        row = Row.model_validate({**fields, **nested})
    except (ValidationError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: row {line['key']} cannot be read: {error}") from error
    if run_key(row.run) != row.key:
        raise FormatError(
            f"{path}: row {row.key} holds a run with the key {run_key(row.run)}; measure it again"
        )
    return row


def _library(name: str) -> ModuleType:
    from importlib import import_module

    check_extra("Parquet", name, "store", OutputError)
    return import_module(name)
