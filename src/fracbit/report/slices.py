"""Slices: rows that differ only in model, bits and seed, and how a slice is written in words.

A slice is made from the whole recipe. So a setting that recipes gain later also separates slices, and appears in their
words by its name and value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fracbit.records.recipe import Recipe
from fracbit.records.row import SAMPLED, Row, Words, settings, worded
from fracbit.records.scheme import Scheme

ANY_BITS = 1
OFFSET_WORDS = {"zero": "zero point", "float": "float offset", "mean": "centered"}
SCHEME_WORDS: Words = {
    "axis": lambda axis: f"blocks along {axis}",
    "offset": OFFSET_WORDS.__getitem__,
    "scale": lambda scale: f"scales {scale}",
}
WORDS: Words = {
    "quantizer": str,
    "search": lambda _: "searched ranges",
    "outliers": lambda outliers: f"16-bit columns {outliers}",
    "tweak": lambda name: f"tweak {name}",
    "chain": lambda chain: f"{chain} chain",
    "transforms": lambda names: f"transforms {'+'.join(names)}",
    "axis": lambda how: f"axis by {how}",
    "distill": lambda epochs: f"{epochs} epochs of distillation",
    "dtype": lambda dtype: f"calibrated in {dtype}",
    "overrides": lambda overrides: f"{len(overrides)} overrides",
}


@dataclass(frozen=True)
class Slice:
    """What the rows of one curve share: their `recipe`, in which model, bits and seed have fixed values.

    Two runs are in the same slice exactly when their recipes differ in nothing else.
    """

    recipe: Recipe

    def __str__(self) -> str:
        return ", ".join([f"{self.dtype}, block {self.block}", *self.words()])

    def words(self) -> list[str]:
        """What differs from rounding to a symmetric data type, in blocks along the inputs with fp16 scales."""
        stored = worded(_apart_from_usual(self.recipe.scheme), SCHEME_WORDS)
        return [*stored, *worded(settings(self.recipe), WORDS)]

    @property
    def plain(self) -> bool:
        """Whether linears are only rounded, without data, in blocks along the inputs."""
        if self.recipe.calibration is not None or self.axis != Scheme().axis:
            return False
        return settings(self.recipe).keys() <= {"embeddings", "head"}

    @property
    def dtype(self) -> str:
        return self.recipe.scheme.dtype

    @property
    def block(self) -> str:
        return str(self.recipe.scheme.block)

    @property
    def axis(self) -> str:
        return self.recipe.scheme.axis

    @property
    def offset(self) -> str:
        return self.recipe.scheme.offset

    @property
    def scale(self) -> str:
        return str(self.recipe.scheme.scale)

    @property
    def quantizer(self) -> str:
        return self.recipe.quantizer

    @property
    def search(self) -> bool:
        return self.recipe.search

    @property
    def outliers(self) -> str:
        return str(self.recipe.outliers or "none")

    @property
    def correction(self) -> str:
        return "none" if self.recipe.calibration is None else self.recipe.calibration.tweak

    @property
    def chain(self) -> str:
        return "" if self.recipe.calibration is None else self.recipe.calibration.chain


def slice_of(row: Row) -> Slice:
    """The slice of a quantized row. Revision and trust in the model's code belong to the model."""
    recipe = row.run.recipe
    fixed = {"model": "", "revision": None, "trust_remote_code": False, "seed": 0}
    return Slice(recipe.model_copy(update={**fixed, "scheme": recipe.scheme.with_bits(ANY_BITS)}))


def named(parts: Iterable[Slice]) -> dict[Slice, str]:
    """Slices in words. Where several have the same words, the calibration data and overrides that differ are added."""
    alike: dict[str, list[Slice]] = defaultdict(list)
    for part in parts:
        alike[str(part)].append(part)
    return {
        part: f"{words} ({difference})" if difference else words
        for words, same in alike.items()
        for part, difference in zip(same, _differences(same), strict=True)
    }


def _differences(parts: Sequence[Slice]) -> list[str]:
    """For each slice, its values of the fields in which the slices differ."""
    facts = [_facts(part.recipe) for part in parts]
    names = [
        name for name in dict.fromkeys(name for each in facts for name in each)
        if len({each.get(name) for each in facts}) > 1
    ]  # fmt: skip
    return [", ".join(f"{name} {each[name]}" for name in names if name in each) for each in facts]


def _facts(recipe: Recipe) -> dict[str, str]:
    """What the words of a slice leave out: its overrides in full, and the data that it is calibrated on."""
    plan = recipe.calibration
    read = {"texts": ("none",)} if plan is None else {name: getattr(plan, name) for name in SAMPLED}
    values = {"overrides": recipe.overrides, **read}
    return {
        name: " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def _apart_from_usual(scheme: Scheme) -> dict[str, Any]:
    """The fields that set a scheme apart from the default with its data type, bits and block."""
    usual = Scheme(scheme.dtype, scheme.bits, scheme.block)
    values = {field.name: getattr(scheme, field.name) for field in fields(scheme)}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}
