"""The end of a run for an engine: the checkpoint beside the output is exported into it, and removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.output import MANIFEST, finished_run, is_unfinished
from fracbit.engines.engine import ENGINES
from fracbit.errors import OutputError
from fracbit.records.progress import Progress
from fracbit.records.run import Result

PARTIAL = ".partial"


def partial_of(output: Path) -> Path:
    """Where the checkpoint of a run for an engine is made. Raises `OutputError` for a path that has no name."""
    whole = output.absolute()
    if not whole.name:
        raise OutputError(f"{output} is the root of a disk; name a folder that does not exist yet")
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
    partial, format_ = Path(result.output), ENGINES[engine].formats[0]
    if _is_made(output, partial, format_):  # a run that was killed before it removed the checkpoint
        size = sum(path.stat().st_size for path in _weight_files(output))
    else:
        unfinished = output.is_dir() and is_unfinished(output)
        made = export(partial, output, format_, overwrite=overwrite, resume=unfinished, progress=progress)
        size = made.bytes
    shutil.rmtree(partial)
    return replace(result, output=str(output), bytes=size, notes=result.notes)


def _is_made(output: Path, partial: Path, format_: str) -> bool:
    """Whether the output is the finished export of this checkpoint."""
    theirs, ours = finished_run(output), finished_run(partial)
    if theirs is None or ours is None:
        return False
    same = all(theirs[1].get(name) == ours[1].get(name) for name in ("recipe_key", "source"))
    return (
        same
        and theirs[1].get("exported") == format_
        and theirs[1].get("checkpoint") == str(partial.resolve())
    )


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
