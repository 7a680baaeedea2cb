"""What an output folder is by the files in it: absent, unfinished, finished, or not fracbit's. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fracbit.errors import OutputError
from fracbit.records.files import read_json

JOURNAL = ".fracbit"
RUN = "plan.json"
"""Holds the key of the run, which names its recipe and source. Only a run with the same key can resume it."""
MANIFEST = "fracbit.json"


def finished_run(folder: Path) -> tuple[str | None, dict[str, Any]] | None:
    """The key of the run that finished a folder (None: fracbit 0.1 wrote none) and its manifest; None for any other folder.

    Raises `FormatError` for a manifest that cannot be read.
    """
    if is_unfinished(folder) or not (folder / MANIFEST).is_file() or not (folder / "config.json").is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    return manifest.get("run"), manifest


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is the output of a run that did not end."""
    return (folder / JOURNAL).is_dir()


def check_output(folder: Path, key: str, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that the run may not write into; nothing is touched."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if resume and not is_unfinished(folder) and (folder / MANIFEST).is_file() and not overwrite:
        found = finished_run(folder)
        if found is not None and found[0] == key:
            raise OutputError(
                f"{folder} is finished: there is nothing to resume; replace it with --overwrite, or name another folder"
            )
        raise OutputError(
            f"{folder} holds the finished output of another recipe or source; "
            "name another folder, or replace it with --overwrite"
        )
    if resume and is_unfinished(folder):
        begun_with = key_of(folder)
        if begun_with not in (None, key) and not overwrite:
            raise OutputError(
                f"{folder} was begun with another recipe or source (key {begun_with}, now {key}); "
                "resume with the same ones, or start again with --overwrite"
            )
        return
    if overwrite and (is_unfinished(folder) or (folder / MANIFEST).is_file()):
        return
    if overwrite:
        raise OutputError(
            f"{folder} is not empty and was not made by fracbit, so it is not overwritten; name another folder"
        )
    begun = "--resume to continue it or --overwrite to start again"
    remedy = begun if is_unfinished(folder) else "--overwrite to replace it, if fracbit made it"
    raise OutputError(f"{folder} is not empty; use {remedy}, or name another folder")


def key_of(folder: Path) -> str | None:
    """The key of the run that began the folder; None when it was killed before it wrote one."""
    path = folder / JOURNAL / RUN
    return str(read_json(path).get("key")) if path.is_file() else None
