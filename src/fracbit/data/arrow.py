"""Parquet files and data sets of the `datasets` library; both libraries are an extra (fracbit[datasets]).

A data set is not one file. So its hash is that of its texts in order (raw.hash_texts), for any cache of the
library.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fracbit.data.lines import Record, collect_records, pick_field
from fracbit.data.raw import RawTexts, hash_file, hash_texts
from fracbit.errors import DataError, blamed_on
from fracbit.records.extras import check_extra
from fracbit.records.text_source import TextSource, find_file


def read_parquet(source: TextSource) -> RawTexts:
    """Read a Parquet file row by row.

    Raises: DataError without pyarrow, for a file that is not Parquet, and for a missing column.
    """
    path = find_file(source)
    parquet = _library("pyarrow.parquet")
    with blamed_on(f"{source.location} cannot be read as a Parquet file", DataError):
        table = parquet.ParquetFile(path)
        field = pick_field(table.schema_arrow.names, source, source.location)
        return collect_records(source, _parquet_rows(table, field), lambda: hash_file(path))


def read_dataset(source: TextSource) -> RawTexts:
    """Read a data set: a folder that save_to_disk wrote, or a name on the hub.

    Raises: DataError without the library, offline, and when name, config, split or column do not exist.
    """
    rows = _only_split(_load(source), source)
    field = pick_field(rows.column_names, source, source.location)
    seen: list[str] = []

    def records() -> Iterator[tuple[str, Record]]:
        for number, record in enumerate(rows.select_columns([field]), 1):
            seen.append(json.dumps(record[field], ensure_ascii=False, sort_keys=True))
            yield f"row {number}", record

    return collect_records(source, records(), lambda: hash_texts(seen))


def _library(name: str) -> ModuleType:
    check_extra("this source", name, "datasets", DataError)
    return importlib.import_module(name)


def _parquet_rows(table: Any, field: str) -> Iterator[tuple[str, Record]]:
    number = 0
    with blamed_on("the file is cut or corrupt", DataError):
        for batch in table.iter_batches(columns=[field]):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record


def _load(source: TextSource) -> Any:
    folder = Path(source.location)
    if folder.is_dir() and not _saved(folder):
        raise DataError(
            f"{source.location} is a folder, but not one that datasets' save_to_disk wrote. Name its files "
            "instead, as several sources."
        )
    datasets = _library("datasets")
    try:
        if folder.is_dir():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(source.location, source.config)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_explain(source, error)) from error


def _saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _explain(source: TextSource, error: Exception) -> str:
    """Why a data set could not be loaded: the libraries raise OSError for a missing data set and a missing network."""
    offline = isinstance(error, ConnectionError) or "offline" in str(error).lower()
    remedy = (
        "The hub cannot be reached (or HF_HUB_OFFLINE is set) and the data set is not in the cache: load it once "
        "online, or save it elsewhere with save_to_disk and name that folder."
        if offline
        else "Check the name and the config."
    )
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{source}: the data set cannot be loaded ({first_line}). {remedy}"


def _only_split(loaded: Any, source: TextSource) -> Any:
    """The split that the source names; it must name one of several."""
    if not isinstance(loaded, dict):
        if source.split is not None:
            raise DataError(f"{source}: {source.location} is a single split; leave :{source.split} out.")
        return loaded
    names = ", ".join(loaded)
    if source.split is None and len(loaded) != 1:
        raise DataError(f"{source}: name one of the splits {names}: datasets:{source.location}:CONFIG:SPLIT.")
    split = next(iter(loaded)) if source.split is None else source.split
    if split not in loaded:
        raise DataError(f"{source}: there is no split {split}; there are {names}.")
    return loaded[split]
