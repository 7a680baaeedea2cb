"""How the command line shows things: progress on stderr, one JSON object or a table on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fracbit.cli.settings import Setting, listing
from fracbit.records.progress import Progress, showing
from fracbit.records.run import Improved


def progress(quiet: bool = False) -> AbstractContextManager[Progress | None]:
    """A progress line on stderr; none when `quiet`."""
    return nullcontext() if quiet else showing("auto")


def print_json(value: Mapping[str, Any]) -> None:
    """Print the JSON object of a command, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; every column except the first is right-aligned. It is 200 columns wide when piped."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_settings(known: Mapping[str, Setting]) -> None:
    """What `--set` takes: every key with its type, its default and what it means."""
    table = Table("KEY", "TYPE", "DEFAULT", "MEANING", box=None, pad_edge=False)
    for key, *rest in listing(known):
        table.add_row(Text(key, no_wrap=True), *map(Text, rest))
    _console().print(table)
    print(
        "\nembeddings.KEY, head.KEY and towers.KEY work like scheme.KEY. Values are TOML, or text without quotes."
    )


def print_notes(notes: Sequence[str]) -> None:
    """Notes, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_said(text: str) -> None:
    """A line on what is about to happen, on stderr."""
    print(text, file=sys.stderr)


def _console() -> Console:
    """Standard output, 200 columns wide when piped."""
    return Console(width=None if Console().is_terminal else 200)


def bytes_text(count: int) -> str:
    """1234567 -> 1.23 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError


def print_improved(made: Improved, *, json: bool, quiet: bool) -> None:
    """Print what `tweak` or `refine` made of a checkpoint."""
    print_notes(() if quiet else made.notes)
    if json:
        print_json(asdict(made))
    else:
        print(f"{made.output}: {bytes_text(made.bytes)}, {made}")
