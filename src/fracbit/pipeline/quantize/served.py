"""The end of a run for an engine: the checkpoint beside the output is exported into it, and removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.export.one_file import (
    is_one_file,
    made_record,
)
from fracbit.checkpoint.folder import is_unfinished
from fracbit.engines.engine import ENGINES
from fracbit.records.progress import Progress
from fracbit.records.run import Result

EXPORT = "export"
"""The folder inside of the checkpoint's in which a file is made."""


def served(
    result: Result, output: Path, engine: str, *, overwrite: bool, progress: Progress | None
) -> Result:
    """Export the checkpoint of `result` into `output`, in the engine's usual format, and remove it. Raises as `export`."""
    partial, format_ = Path(result.output), ENGINES[engine].formats[0]
    if not overwrite and _is_made(
        output, partial, format_
    ):  # a run that was killed before it removed the checkpoint
        size = sum(path.stat().st_size for path in _weight_files(output))
    else:
        work = partial / EXPORT
        unfinished = is_unfinished(work if is_one_file(output) else output)
        made = export(
            partial, output, format_, work=work, overwrite=overwrite, resume=unfinished, progress=progress
        )
        size = made.bytes
    shutil.rmtree(partial)
    return replace(result, output=str(output), bytes=size, notes=result.notes)


def _is_made(output: Path, partial: Path, format_: str) -> bool:
    """Whether the output is the finished export of this checkpoint."""
    theirs, ours = made_record(output), made_record(partial)
    if theirs is None or ours is None:
        return False
    same = theirs.get("exported") == format_ and theirs.get("checkpoint_run") == ours.get("run")
    return same and theirs.get("source") == ours.get("source")


def _weight_files(output: Path) -> list[Path]:
    return [output] if output.is_file() else [*output.glob("*.safetensors"), *output.glob("*.gguf")]
