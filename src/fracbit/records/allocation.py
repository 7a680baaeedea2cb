"""`Allocation`: which scheme each layer gets, as JSON, and `read_level`, which reads a scheme or `float`. Torch-free.

It is what a budget makes of scores (arXiv:2406.17415 and finer ones), and all that the quantizing loop sees of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fracbit.errors import FormatError, RecipeError, SchemeError
from fracbit.records.files import check_keys, read_json, write_json
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme, parse_scheme
from fracbit.records.scores import read_scheme

VERSION = 1
KEYS: dict[str, type] = {"schemes": list, "layers": dict, "model": str, "origin": dict, "notes": list}


@dataclass(frozen=True)
class Allocation:
    """The scheme of every layer; None keeps it float.

    - `schemes`: full name of a linear -> scheme.
    - `model`: fingerprint of the model it was made for; `origin`: budget, score, solver and predicted loss that led to it.
    - `notes`: what the user should know, such as that the uniform choice won.
    """

    schemes: Mapping[str, Scheme | None]
    model: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """How many layers got each scheme: `12 x int4z/64, 9 x float`."""
        return ", ".join(f"{count} x {scheme or 'float'}" for scheme, count in self.used().items())

    def used(self) -> dict[Scheme | None, int]:
        """How many layers got each scheme."""
        counts: dict[Scheme | None, int] = {}
        for scheme in self.schemes.values():
            counts[scheme] = counts.get(scheme, 0) + 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object: each scheme once, and for each layer the number of its scheme."""
        used = list(self.used())
        number = {scheme: index for index, scheme in enumerate(used)}
        return {
            "allocation": VERSION,
            "model": self.model,
            "origin": dict(self.origin),
            "notes": list(self.notes),
            "schemes": [
                None if scheme is None else {"label": str(scheme), **scheme.to_json()} for scheme in used
            ],
            "layers": {name: number[scheme] for name, scheme in self.schemes.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Allocation:
        """Read what `to_json` wrote. Raises `FormatError` for another version, missing keys or a number without a scheme."""
        data = {"model": "", "origin": {}, "notes": [], **data}
        check_keys(data, "allocation", VERSION, KEYS)
        schemes = [read_scheme(item) for item in data["schemes"]]
        layers = {name: _numbered(name, number, schemes) for name, number in data["layers"].items()}
        return Allocation(layers, data["model"], data["origin"], notes=tuple(map(str, data["notes"])))


def uniform(names: Iterable[str], scheme: Scheme | None, model: str = "") -> Allocation:
    """The allocation that gives every layer the same scheme."""
    return Allocation(dict.fromkeys(names, scheme), model, {"solver": "uniform"})


def check_allocation(allocation: Allocation, names: Sequence[str], model: str = "") -> None:
    """Refuse an allocation that does not name exactly these layers, or was made for another `model`. Raises `RecipeError`."""
    missing = [name for name in names if name not in allocation.schemes]
    unknown = [name for name in allocation.schemes if name not in set(names)]
    if missing or unknown:
        some = ", ".join((missing or unknown)[:3])
        raise RecipeError(
            f"this allocation belongs to another model: it {'lacks' if missing else 'names the unknown'} {some}, and "
            f"the model has {len(names)} layers. Plan for this model"
        )
    if model and allocation.model and allocation.model != model:
        raise RecipeError(
            f"this allocation was made for model {allocation.model} and not for {model}: the layers have the same names but "
            "other weights. Plan for this model, or take the fingerprint out of the file to use it anyway"
        )


def save_allocation(allocation: Allocation, path: Path) -> None:
    """Write as readable JSON, under a temporary name first. Raises `OutputError`."""
    write_json(allocation.to_json(), path)


def load_allocation(path: Path) -> Allocation:
    """Read what `save_allocation` wrote. Raises `FormatError`."""
    return Allocation.from_json(read_json(path))


def allocated(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with the allocation as overrides, one a layer, after those it had: later ones win."""
    mine = tuple(
        Override(layers=name, keep=True) if scheme is None else Override(layers=name, scheme=scheme)
        for name, scheme in allocation.schemes.items()
    )
    return recipe.model_copy(update={"overrides": (*recipe.overrides, *mine)})


def read_level(level: Scheme | str | None) -> Scheme | None:
    """A scheme or None as it is, or from its word: `float` is None, anything else as `parse_scheme`. Raises `SchemeError`."""
    if isinstance(level, str):
        return None if level.strip() == "float" else parse_scheme(level)
    if level is None or isinstance(level, Scheme):
        return level
    raise SchemeError(
        f"{level!r} is not a scheme; write a word such as nf4/64, a Scheme, or float (None) to keep a layer"
    )


def read_levels(levels: str | Iterable[Scheme | str | None]) -> tuple[Scheme | None, ...]:
    """Schemes from words with commas between them, `nf4/64,nf3/64,int2z/32`, or one by one. Raises `SchemeError`."""
    given = [word for word in levels.split(",") if word.strip()] if isinstance(levels, str) else levels
    return tuple(read_level(each) for each in given)


def _numbered(name: str, number: object, schemes: list[Scheme | None]) -> Scheme | None:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(schemes):
        raise FormatError(
            f"layer {name} has scheme number {number!r}, but the allocation holds {len(schemes)}"
        )
    return schemes[number]
