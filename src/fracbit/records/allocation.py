"""`Allocation`: which scheme each layer gets, as JSON, and `read_level`, which reads a scheme's short label. Torch-free.

It is what a budget makes of scores (arXiv:2406.17415 and finer ones), and all that the quantizing loop sees of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fracbit.errors import FormatError, RecipeError, SchemeError
from fracbit.records.files import check_keys, read_json, write_json
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.scores import read_scheme

VERSION = 1
KEYS: dict[str, type] = {"schemes": list, "layers": dict, "model": str, "origin": dict, "notes": list}
_OFFSETS = {"": "none", "z": "zero", "f": "float", "m": "mean"}
_LABEL = re.compile(
    r"(?P<dtype>[a-z]+(:[A-Za-z0-9./]+?)?)(?P<bits>\d)(?P<offset>[zfm]?)([/:](?P<block>row|tensor|flat:\d+|\d+))?"
    r"(?P<axis> out)?( s=(?P<scale>[a-z0-9:]+))?"
)


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


def recipe_text(allocation: Allocation, recipe: Recipe) -> str:
    """The recipe's model, embeddings and head with an override for each layer, as TOML for `fracbit quantize`."""
    lines = [f"# {note}" for note in allocation.notes] + [f"model = {json.dumps(recipe.model)}"]
    for name, scheme in (("embeddings", recipe.embeddings), ("head", recipe.head)):
        if scheme is not None:
            lines.append(f"{name} = {_inline(scheme.to_json())}")
    for name, scheme in allocation.schemes.items():
        chosen = "keep = true" if scheme is None else f"scheme = {_inline(scheme.to_json())}"
        lines += ["", "[[overrides]]", f"layers = {json.dumps(name)}", chosen]
    return "\n".join(lines) + "\n"


def _inline(value: object) -> str:
    """A value as TOML: strings and numbers are written as in JSON, tables inline."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def read_level(label: str) -> Scheme | None:
    """A scheme from its short label, `str(scheme)`: `nf4/64`, `int3z/128 out`, `power:1/24/row s=fp32`; `float` is None.

    A colon may stand for the slash, as in `parse_scheme`; without a block it is 64. Raises `SchemeError` for anything else.
    """
    text = label.strip()
    if text == "float":
        return None
    match = _LABEL.fullmatch(text)
    if match is None:
        raise SchemeError(
            f"{label!r} is not a scheme: write TYPE, BITS, a slash and BLOCK without spaces, such as nf4/64, int3z/128 or "
            "kmeans:row2/row, then ' out' for the other axis; z, f or m after the bits is the offset; float keeps a layer"
        )
    size = match["block"] or "64"
    block: int | str = int(size) if size.isdecimal() else size
    offset = _OFFSETS[match["offset"]]
    axis = "out" if match["axis"] else "in"
    return Scheme(
        dtype=match["dtype"],
        bits=int(match["bits"]),
        block=block,
        axis=axis,  # type: ignore[arg-type]
        offset=offset,  # type: ignore[arg-type]
        scale=match["scale"] or "fp16",
    )


def read_levels(text: str) -> tuple[Scheme | None, ...]:
    """Schemes from labels with commas between them: `nf4/64,nf3/64,int2z/32`."""
    return tuple(read_level(label) for label in text.split(",") if label.strip())


def _numbered(name: str, number: object, schemes: list[Scheme | None]) -> Scheme | None:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(schemes):
        raise FormatError(
            f"layer {name} has scheme number {number!r}, but the allocation holds {len(schemes)}"
        )
    return schemes[number]
