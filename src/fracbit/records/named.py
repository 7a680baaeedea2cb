"""`Named`: an entry of a table with options, in one word: `gptq`, `gptq:damping=0.05`, `descent:rounds=4`. Torch-free.

The name is checked here. Options are checked by the object that the name stands for, where it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from fracbit.errors import RecipeError
from fracbit.records.tables import QUANTIZERS, Table


@dataclass(frozen=True)
class Named:
    """A name of a table and its `options`, as text by name, in alphabetical order."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.name}:{given}" if given else self.name


def read_named(word: str, table: Table[Any]) -> Named:
    """Read NAME or NAME:KEY=VALUE,KEY=VALUE. Raises `RecipeError` for an unknown name and for anything else."""
    name, colon, rest = (part.strip() for part in word.partition(":"))
    table.check(name)
    pairs = [tuple(part.strip() for part in each.partition("=")) for each in rest.split(",")] if colon else []
    options = {key: _number(value) for key, _, value in pairs}
    if not all(key and value for key, value in options.items()) or len(options) < len(pairs):
        raise RecipeError(
            f"{table.kind} {word!r}: write {name}, or {name}:KEY=VALUE with commas between several, each key once"
        )
    return Named(name, tuple(sorted(options.items())))


def _number(text: str) -> str:
    """A number in its shortest form, so that equal options have equal words; any other text as it is."""
    try:
        return f"{float(text):.12g}"
    except ValueError:
        return text


def _word(text: str) -> str:
    return str(read_named(text, QUANTIZERS))


QuantizerField = Annotated[str, AfterValidator(_word)]
