"""The end of a run for an engine: the checkpoint beside the output is exported into it, and removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.output import MANIFEST, is_unfinished
from fracbit.engines.engine import ENGINES
from fracbit.errors import OutputError
from fracbit.records.progress import Progress
from fracbit.records.run import Result

PARTIAL = ".partial"


def partial_of(output: Path) -> Path:
    """Where the checkpoint of a run for an engine is made."""
    whole = output.absolute()
    return whole.with_name(whole.name + PARTIAL)


def check_resumable(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `OutputError` for a run that is to go on and has ended, or is to begin and was begun."""
    partial = partial_of(output)
    if (
        resume
        and not overwrite
        and not partial.exists()
        and (output / MANIFEST).is_file()
        and not is_unfinished(output)
    ):
        raise OutputError(
            f"{output} is finished: there is nothing to resume; replace it with --overwrite, or name another folder"
        )
    if partial.exists() and not (resume or overwrite):
        raise OutputError(
            f"{partial} is a run that did not end; use --resume to continue it, or --overwrite to start again"
        )


def served(
    result: Result, output: Path, engine: str, *, overwrite: bool, progress: Progress | None
) -> Result:
    """Export the checkpoint of `result` into `output`, in the engine's usual format, and remove it. Raises as `export`."""
    unfinished = output.is_dir() and is_unfinished(output)
    made = export(
        result.output,
        output,
        ENGINES[engine].formats[0],
        overwrite=overwrite,
        resume=unfinished,
        progress=progress,
    )
    shutil.rmtree(result.output)
    return replace(result, output=str(output), bytes=made.bytes, notes=(*result.notes, *made.notes))
