"""The end of a run for an engine: the checkpoint beside the output is exported into it, and removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.export.one_file import (
    FORMATS_OF,
    check_ending,
    check_file,
    is_one_file,
    made_record,
    partial_of,
)
from fracbit.checkpoint.output import check_output, is_unfinished
from fracbit.engines.engine import ENGINES
from fracbit.errors import OutputError
from fracbit.records.progress import Progress
from fracbit.records.run import Result
from fracbit.records.tables import SERVING

EXPORT = "export"
"""The folder inside of the checkpoint's in which a file is made."""


def place_of(output: Path, engine: str | None, *, resume: bool, overwrite: bool) -> Path:
    """Where the checkpoint of a run is made: in the output itself, or beside it for an engine.

    Raises `RecipeError` for a file that is none of the engine's, `OutputError` for an output that the run may not write.
    """
    if is_one_file(output):
        wanted = FORMATS_OF[output.suffix]
        engines = [name for name in SERVING if ENGINES[name].formats[0] == wanted]
        given = "" if engine is None else ENGINES[engine].formats[0]
        check_ending(output, given, f"write --for {' or '.join(engines)}")
    place = output
    if engine is not None:
        place = partial_of(output)
        check_resumable(output, resume=resume, overwrite=overwrite)
    # Before scores and trials, which may take long; a resumed folder is known by its key.
    if is_one_file(output):
        check_file(output, overwrite=overwrite, resume=resume)
    elif not resume:
        check_output(output, "", overwrite, resume)
    return place


def check_resumable(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `OutputError` for a run that is to go on and has ended, or is to begin and was begun."""
    partial = partial_of(output)
    if resume and not overwrite and not partial.exists() and made_record(output) is not None:
        raise OutputError(
            f"{output} is finished: there is nothing to resume; replace it with --overwrite, or name another output"
        )
    if partial.exists() and not (resume or overwrite):
        raise OutputError(
            f"{partial} is a run that did not end; use --resume to continue it, or --overwrite to start again"
        )


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
    same = all(theirs.get(name) == ours.get(name) for name in ("recipe_key", "source"))
    return same and theirs.get("exported") == format_ and theirs.get("checkpoint") == str(partial.resolve())


def _weight_files(output: Path) -> list[Path]:
    return [output] if output.is_file() else [*output.glob("*.safetensors"), *output.glob("*.gguf")]
