"""What Ctrl-C leaves behind: what was kept, and the command that goes on. Torch-free."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fracbit.checkpoint.export.one_file import is_one_file, partial_of
from fracbit.checkpoint.folder import JOURNAL, RUN

INTERRUPTED = 130  # the exit code after Ctrl-C


class Stopped(Exception):
    """Ctrl-C came; the message says what was kept."""


@contextmanager
def keeping(output: Path, beside: bool = False) -> Iterator[None]:
    """Turn Ctrl-C into `Stopped` for work on an output that --resume continues.

    `beside`: the work is done in OUT.partial, as for one file. Exceptions inside pass through.
    """
    place = partial_of(output) if beside or is_one_file(output) else output
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(kept(place, sys.argv[1:])) from None


@contextmanager
def keeping_rows(store: str) -> Iterator[None]:
    """Turn Ctrl-C into `Stopped` for a sweep into `store` (as it is shown), which the same command continues."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["fracbit", *sys.argv[1:]])
        raise Stopped(f"every finished run is a row of {store}; go on with: {again}") from None


def kept(place: Path, words: Sequence[str]) -> str:
    """What the unfinished output `place` holds, and how to go on with the command line `words`."""
    journal = place / JOURNAL
    if not journal.is_dir():
        return "nothing was written yet; the same command starts again"
    parts = [path for path in journal.glob("*.json") if path.name != RUN and (place / path.stem).exists()]
    rest = [word for word in words if word not in ("--resume", "--overwrite")]
    held = f"{len(parts)} finished part{'' if len(parts) == 1 else 's'} kept in {place}"
    return f"{held}; go on with: {shlex.join(['fracbit', *rest, '--resume'])}"
