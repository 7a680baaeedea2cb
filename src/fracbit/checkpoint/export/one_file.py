"""Outputs that are one file, `-o model.gguf`: the work is done in model.gguf.partial/, and the file is moved out at the end.

So the file is absent or complete at any moment. What fracbit.json would say stands inside it (formats/gguf_record.py).
Torch-free, so that a command line refuses an output before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fracbit.checkpoint.folder import check_output, finished_run
from fracbit.checkpoint.place import GGUF
from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.errors import OutputError, RecipeError
from fracbit.records.tables import ENGINES, SERVING

FORMATS_OF = {GGUF: "gguf"}
"""The format of a file, by its ending."""
PARTIAL = ".partial"


def is_one_file(output: Path) -> bool:
    """Whether an output is a file by its name."""
    return output.suffix in FORMATS_OF


def partial_of(output: Path) -> Path:
    """Where work on an output is done. Raises `OutputError` for a path that has no name."""
    whole = output.absolute()
    if not whole.name:
        raise OutputError(f"{output} is the root of a disk; name a folder that does not exist yet")
    return whole.with_name(whole.name + PARTIAL)


def check_ending(output: Path, format_: str, remedy: str) -> None:
    """Raise `RecipeError` where a file is to be of another format than its ending says; `remedy`: what to write then."""
    if is_one_file(output) and format_.partition(":")[0] != (wanted := FORMATS_OF[output.suffix]):
        raise RecipeError(
            f"{output} ends in {output.suffix}, which is one file of the format {wanted}, and {format_ or 'a checkpoint'} is "
            f"asked for; {remedy}, or name a folder"
        )


def check_file(file: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a file that a run may not write; nothing is touched. Raises `OutputError`, `FormatError`."""
    if file.is_dir():
        raise OutputError(
            f"{file} is a folder, and the output is one file; name a file that does not exist yet, or a folder that does not "
            f"end in {file.suffix}"
        )
    if not file.exists():
        return
    if (overwrite or resume) and made_record(file) is None:
        raise OutputError(f"{file} was not made by fracbit, so it is not overwritten; name another file")
    if overwrite or (resume and partial_of(file).is_dir()):
        return
    if resume:
        raise OutputError(
            f"{file} is finished: there is nothing to resume; replace it with --overwrite, or name another file"
        )
    raise OutputError(
        f"{file} exists; use --overwrite to replace it, if fracbit made it, or name another file"
    )


def made_in(output: Path, engine: str | None, *, resume: bool, overwrite: bool) -> Path:
    """Where the checkpoint of a run is made: in the output itself, or beside it for an engine.

    Raises `RecipeError` for a file that is none of the engine's, `OutputError` for an output that the run may not write.
    """
    if is_one_file(output):
        wanted = FORMATS_OF[output.suffix]
        engines = [name for name, usual in SERVING.items() if usual == wanted]
        given = "" if engine is None else SERVING.get(engine) or ENGINES[engine].formats[0]
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


def made_record(output: Path) -> Mapping[str, Any] | None:
    """The manifest of a finished output of fracbit, a folder or one file; None for any other. Raises `FormatError`."""
    if output.is_file():
        return read_manifest(output) or None
    found = finished_run(output)
    return None if found is None else found[1]
