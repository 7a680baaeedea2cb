"""Names and notes in a few words: the first of many names, and one line for all layers with the same note."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SHOWN = 4  # names in a message
NOTES = 24  # most notes on single layers that a result shows


def some_of(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def grouped(notes: Iterable[tuple[str, str]], where: str) -> tuple[str, ...]:
    """Notes on layers, given as (layer, note); layers with equal notes share a line. `where` all of them are: a file."""
    named: dict[str, list[str]] = {}
    for layer, note in notes:
        named.setdefault(note, []).append(layer)
    lines = [f"{note} ({some_of(layers)})" for note, layers in named.items()]
    rest = [f"{len(lines) - NOTES} more notes on layers: see {where}"] if len(lines) > NOTES else []
    return (*lines[:NOTES], *rest)
