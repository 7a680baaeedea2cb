"""The output folder: every file is written under a temporary name, flushed and renamed; config.json comes last.

While a run is unfinished the folder holds `.fracbit/`: the plan's key and one record per finished shard. Whoever finds that
folder knows that the checkpoint is not complete, and `--resume` continues from the records. Without it the checkpoint is
whole: killed at any moment, an output is absent, resumable or complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fracbit.errors import OutputError

JOURNAL = ".fracbit"
PLAN = "plan.json"
MANIFEST = "fracbit.json"
SPARE_BYTES = 16 << 20  # for the tokenizer, the card and the file system's own blocks


@dataclass(frozen=True)
class Output:
    """An output folder that is being filled by the run whose plan has this key."""

    folder: Path

    def record(self, shard: str) -> dict[str, Any] | None:
        """What was noted when `shard` was finished, or None when it still has to be made."""
        path = self.folder / JOURNAL / f"{shard}.json"
        if not path.is_file() or not (self.folder / shard).is_file():
            return None
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a shard and then its record: a shard without a record is made again."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _replace(self.folder / shard, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
        write_json(self.folder / JOURNAL / f"{shard}.json", record)

    def finish(self, config: Mapping[str, Any]) -> None:
        """config.json makes the checkpoint loadable; the journal goes last."""
        write_json(self.folder / "config.json", config)
        _empty(self.folder / JOURNAL)
        (self.folder / JOURNAL).rmdir()


@contextmanager
def open_output(
    folder: Path, key: str, expected_bytes: int, overwrite: bool, resume: bool
) -> Iterator[Output]:
    """An output for the plan `key`. Raises `OutputError` when the folder is not empty, is another run's, or cannot hold it."""
    check_output(folder, key, overwrite, resume)
    _check_space(folder, expected_bytes)
    with _disk_errors(folder):
        if overwrite and not (resume and is_unfinished(folder) and _plan_key(folder) == key):
            _clear(folder)
        (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        write_json(folder / JOURNAL / PLAN, {"key": key})
        yield Output(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is the output of a run that did not end."""
    return (folder / JOURNAL).is_dir()


def check_output(folder: Path, key: str, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that the run may not write into; nothing is touched."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if resume and is_unfinished(folder):
        found = _plan_key(folder)
        if found not in (None, key) and not overwrite:
            raise OutputError(
                f"{folder} was begun with another recipe or source (plan {found}, now {key}); "
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


def _plan_key(folder: Path) -> str | None:
    """The key of the plan that the folder was begun with; None when the run was killed before it wrote one."""
    path = folder / JOURNAL / PLAN
    return str(json.loads(path.read_text())["key"]) if path.is_file() else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    _replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with _disk_errors(path.parent):
        try:
            write(temporary)
            # safetensors makes files for their owner alone; a server often runs as somebody else.
            temporary.chmod(0o600 | (path.parent.stat().st_mode & 0o044))
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk: a rename must not survive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise OutputError(
            f"{folder} cannot be written: {what}; what is finished stays, continue with --resume"
        ) from error


def _check_space(folder: Path, expected: int) -> None:
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free + written
    if free < expected + SPARE_BYTES:
        raise OutputError(
            f"{folder} needs {expected:,} bytes but its disk has {free:,} free; make room or name another disk"
        )


def _clear(folder: Path) -> None:
    """Remove the files of an earlier fracbit output; folders other than the journal are left alone.

    The journal is there from before the first removal to after the last: killed in between, the folder is unfinished.
    """
    if not folder.is_dir():
        return
    journal = folder / JOURNAL
    journal.mkdir(exist_ok=True)
    _empty(journal)
    for path in folder.iterdir():
        if path.is_file() or path.is_symlink():
            path.unlink()


def _empty(journal: Path) -> None:
    """Remove what is in the journal, the plan last: records without a plan would pass for those of any other one."""
    for path in sorted(journal.iterdir(), key=lambda path: path.name == PLAN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
