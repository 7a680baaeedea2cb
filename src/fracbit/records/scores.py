"""`Scores` and `Losses`: how important each layer is, as JSON that can be saved, edited by hand and used again. Torch-free.

`Scores` is one float per layer, larger means more important: all that the layer-wise paper (Dumitru et al. 2024,
arXiv:2406.17415) needs to sort layers. `Losses` is one float per layer and scheme; an exact allocation minimizes their sum.
Both carry the fingerprint of the model they were measured on and are refused for any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fracbit.errors import FormatError, RecipeError
from fracbit.records.files import check_keys, read_json, write_json
from fracbit.records.scheme import Scheme

ScoreKind = Literal["order", "sensitivity"]
"""What a score's numbers mean: only an order, or nats of loss per squared relative error of the weights."""

VERSION = 1
HEAD: dict[str, type] = {"method": str, "model": str, "protocol": dict}


@dataclass(frozen=True)
class Scores:
    """One float for each layer of one model; larger is more important.

    - `values`: layer name (a block's or a linear's) -> score.
    - `method`: how they were made, such as `lim`; `kind`: what the numbers mean.
    - `model`: fingerprint of the model (`fingerprint`); `protocol`: tokens, seeds, schemes: all that the numbers depend on.

    Raises `RecipeError` when a value is NaN or infinite, or there is none.
    """

    values: Mapping[str, float]
    method: str
    model: str
    kind: ScoreKind = "order"
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be sorted or summed."""
        if not self.values:
            raise RecipeError("scores name no layer; give every layer of the model a number")
        _check_finite(self.values.items())
        if self.kind not in get_args(ScoreKind):
            raise RecipeError(
                f"scores of kind {self.kind!r} are not known; use {', '.join(get_args(ScoreKind))}"
            )

    def order(self) -> tuple[str, ...]:
        """Layers, the most important first; equal scores keep the order of the model."""
        return tuple(sorted(self.values, key=lambda name: -self.values[name]))

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object; `from_json` reads it back."""
        return {"scores": VERSION, **_head(self), "kind": self.kind, "values": dict(self.values)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scores:
        """Read what `to_json` wrote. Raises `FormatError` for another version, missing keys or values of another type."""
        data = {"protocol": {}, **data}
        check_keys(data, "scores", VERSION, HEAD | {"kind": str, "values": dict})
        values = {name: _number(name, value) for name, value in data["values"].items()}
        return Scores(values, data["method"], data["model"], kind=data["kind"], protocol=data["protocol"])


@dataclass(frozen=True)
class Losses:
    """The predicted loss of each layer under each of several schemes; an allocation minimizes the sum over layers.

    `rows`: layer name -> one float for each of `schemes` (None: kept float). The rest is as in `Scores`.
    Raises `RecipeError` for NaN, infinity, or a row of another length.
    """

    schemes: tuple[Scheme | None, ...]
    rows: Mapping[str, tuple[float, ...]]
    method: str
    model: str
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse ragged rows and numbers that cannot be summed."""
        for name, row in self.rows.items():
            if len(row) != len(self.schemes):
                raise RecipeError(f"losses of {name} are {len(row)} numbers for {len(self.schemes)} schemes")
            _check_finite((name, value) for value in row)

    def scores(self, low: int, high: int) -> Scores:
        """What a layer gains from scheme number `high` instead of `low`: the paper's order from measured losses."""
        values = {name: row[low] - row[high] for name, row in self.rows.items()}
        return Scores(values, self.method, self.model, kind="order", protocol=self.protocol)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object; `from_json` reads it back."""
        schemes = [None if scheme is None else scheme.to_json() for scheme in self.schemes]
        rows = {name: list(row) for name, row in self.rows.items()}
        return {"losses": VERSION, **_head(self), "schemes": schemes, "rows": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Losses:
        """Read what `to_json` wrote. Raises `FormatError` for another version, missing keys or values of another type."""
        data = {"protocol": {}, **data}
        check_keys(data, "losses", VERSION, HEAD | {"schemes": list, "rows": dict})
        schemes = tuple(read_scheme(item) for item in data["schemes"])
        rows = {name: _numbers(name, row) for name, row in data["rows"].items()}
        return Losses(schemes, rows, data["method"], data["model"], protocol=data["protocol"])


def fingerprint(layers: Iterable[tuple[str, tuple[int, int]]], sample: bytes = b"") -> str:
    """16 hex digits of a model: its layers' names and shapes [out, in], and `sample`, bytes of its weights.

    With `sample`, a base model and its fine-tuned sibling differ: scores of one say little about the other.
    """
    digest = hashlib.sha256(json.dumps([[name, list(shape)] for name, shape in layers]).encode())
    digest.update(sample)
    return digest.hexdigest()[:16]


def check_scores(record: Scores | Losses, layers: Sequence[str], model: str | None = None) -> None:
    """Refuse scores that do not name exactly `layers`, or that were measured on another `model`.

    Raises `RecipeError` that lists the first names that differ.
    """
    names = record.values if isinstance(record, Scores) else record.rows
    missing = [name for name in layers if name not in names]
    unknown = [name for name in names if name not in set(layers)]
    if missing or unknown:
        raise RecipeError(
            f"these {record.method} scores belong to another model: "
            + "; ".join(
                _named(what, some) for what, some in (("without", missing), ("unknown", unknown)) if some
            )
            + f". Expected {len(layers)} layers; make new scores for this model"
        )
    if model is not None and record.model != model:
        raise RecipeError(
            f"these {record.method} scores were measured on model {record.model} and not on {model}: the layers have the "
            "same names but other weights. Make new scores, or put this fingerprint into the file to use them anyway"
        )


def save_json(record: Scores | Losses, path: Path) -> None:
    """Write a record as readable JSON, under a temporary name first. Raises `OutputError`."""
    write_json(record.to_json(), path)


def load_scores(path: Path) -> Scores | Losses:
    """Scores or losses from a file, whichever it holds. Raises `FormatError`, `RecipeError`."""
    data = read_json(path)
    if "losses" in data:
        return Losses.from_json(data)
    return Scores.from_json(data)


def _head(record: Scores | Losses) -> dict[str, Any]:
    return {"method": record.method, "model": record.model, "protocol": dict(record.protocol)}


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"the score of {name} is {value!r}, expected a number")
    return float(value)


def read_scheme(item: object) -> Scheme | None:
    """A scheme as an object of its fields, None for null. Raises `FormatError`, `SchemeError`."""
    if item is None:
        return None
    if not isinstance(item, Mapping):
        raise FormatError(f"a scheme is {item!r}, expected an object or null")
    return Scheme.from_json({key: value for key, value in item.items() if key != "label"})


def _numbers(name: str, row: object) -> tuple[float, ...]:
    if not isinstance(row, list):
        raise FormatError(
            f"the losses of {name} are {row!r}, expected an array of numbers, one for each scheme"
        )
    return tuple(_number(name, value) for value in row)


def _check_finite(items: Iterable[tuple[str, float]]) -> None:
    for name, value in items:
        if not math.isfinite(value):
            raise RecipeError(f"the score of {name} is {value}; every layer needs a finite number")


def _named(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"
