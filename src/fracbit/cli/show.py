"""How the command line shows things: progress on stderr, one JSON object or a table on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Step = Callable[[str, int, int], None]


@contextmanager
def progress(quiet: bool = False) -> Iterator[Step]:
    """A progress bar on stderr, fed by calls of (what is being done, done, total); none when `quiet`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        "{task.percentage:>3.0f}%",
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=None)

        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=what[-48:], completed=done, total=total)

        yield step


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a command, alone on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; every column but the first is set to the right. As wide as it needs to be when piped."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def print_notes(notes: Sequence[str]) -> None:
    """Notes, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def bytes_text(count: int) -> str:
    """1234567 -> 1.23 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError
