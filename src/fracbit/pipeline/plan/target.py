"""A run for an engine: recipe and budget with only the schemes that the engine serves, for the shapes of the model at hand.

    what was asked for -> the nearest forms that the engine serves -> recipe, budget, notes on every difference

Whatever chooses codes then fills the very grid that the engine reads, and the export writes it without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fracbit.checkpoint.export.exporter import FORMATS
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.codes import config_type
from fracbit.checkpoint.opened import Opened
from fracbit.engines.engine import ENGINES, Forms, ServingEngine
from fracbit.errors import RecipeError
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Offset, Scheme
from fracbit.records.spending import Spending
from fracbit.transforms import TRANSFORMS

NEAREST = 3  # widths around a budget
SYMMETRIC_OR_NOT: tuple[Offset, ...] = ("none", "zero")
LEVELS = tuple(
    Scheme("int:step", bits, block, offset=offset)
    for bits in (2, 3, 4, 5, 6, 8)
    for block in (32, 64, 128)
    for offset in SYMMETRIC_OR_NOT
)
"""What a budget chooses from where nothing else was asked for."""
TABLE = Scheme("int:step", 8, 64)
"""What an embedding table gets where the engine serves quantized ones and nothing else was asked for."""
TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True, eq=False)
class EngineTarget:
    """An engine and the shapes of a model. `forms`: what it serves; `floats`: linears that it can only have as floats."""

    name: str
    engine: ServingEngine
    forms: Forms
    shape: tuple[int, int]
    floats: dict[str, str]

    def scheme(self, asked: Scheme) -> Scheme:
        """The nearest scheme that the engine serves for every linear of the model. Raises `RecipeError`."""
        near = self.forms.nearest(StoredLayer(asked, self.shape))
        if not isinstance(near.scheme, Scheme):
            raise RecipeError(f"{self.name} serves nothing near {asked} for this model: {near.reason}")
        return near.scheme

    def levels(self, asked: Iterable[Scheme | None]) -> tuple[Scheme | None, ...]:
        """The schemes near those asked for, without repeats."""
        return tuple(dict.fromkeys(None if level is None else self.scheme(level) for level in asked))

    def own_levels(self, average: float | None) -> tuple[Scheme | None, ...]:
        """What a budget chooses from where nothing else was asked for: the three widths nearest to its average, at every block.

        Floats too where the engine serves a single width.
        """
        found = self.levels(LEVELS)
        widths = sorted({one.bits for one in found if one})
        if average is not None:
            widths = sorted(widths, key=lambda bits: abs(bits + 0.5 - average))[:NEAREST]
        kept = tuple(one for one in found if one and one.bits in widths)
        return (*kept, None) if len(widths) == 1 else kept


def for_engine(
    recipe: Recipe, spending: Spending, opened: Opened, *, own: Recipe
) -> tuple[Recipe, Spending, tuple[str, ...]]:
    """The recipe and budget for the engine that `spending` names, and notes on what was asked for and is not served.

    `own`: the recipe before a preset filled it, whose schemes were asked for. Without an engine nothing changes.
    Raises `RecipeError` for what the engine does not serve and nothing near would do.
    """
    if spending.engine is None:
        return recipe, spending, ()
    target = target_of(spending.engine, opened)
    FORMATS[target.engine.formats[0]]("").check(opened.model, opened.source.folder)
    _check(recipe, target)
    if target.engine.fused:
        _check_together(recipe, opened, target)
    changes: dict[str, object] = {"overrides": _overrides(recipe, target)}
    if not spending.asked:
        asked = "scheme" in recipe.model_fields_set
        changes["scheme"] = target.scheme(recipe.scheme if asked else target.engine.usual)
    if target.forms.embeddings:
        changes["embeddings"] = _table(recipe, opened, target)
    if recipe.head is not None:
        changes["head"] = target.scheme(recipe.head)
    changed = recipe.model_copy(update=changes)
    notes = [
        *_differences(own, changed, target),
        *(f"{name} stays float: {why}" for name, why in target.floats.items()),
    ]
    if not spending.asked:
        return changed, Spending(), tuple(notes)
    free = spending.levels is None
    levels = target.own_levels(spending.average_bits) if free else target.levels(spending.schemes)
    fused = spending.fused or target.engine.fused
    return changed, replace(spending, engine=None, levels=levels, fused=fused), tuple(notes)


def _overrides(recipe: Recipe, target: EngineTarget) -> tuple[Override, ...]:
    """The recipe's, with schemes that the engine serves, and what it can only have as floats."""
    own = [
        each if each.scheme is None else each.model_copy(update={"scheme": target.scheme(each.scheme)})
        for each in recipe.overrides
    ]
    return (*own, *(Override(layers=name, keep=True) for name in target.floats))


def _table(recipe: Recipe, opened: Opened, target: EngineTarget) -> Scheme | None:
    """The scheme of the embedding tables, which have shapes of their own; None keeps them float. Raises `RecipeError`."""
    near = {
        target.forms.nearest(StoredLayer(recipe.embeddings or TABLE, (one.out, one.width), kind="embedding"))
        for one in opened.layers.values()
        if one.kind == "embedding"
    }
    schemes = {each.scheme for each in near}
    if len(schemes) == 1 and isinstance(only := schemes.pop(), Scheme):
        return only
    if recipe.embeddings is None:
        return None
    reasons = "; ".join(each.reason for each in near) or "the model has none"
    raise RecipeError(
        f"{target.name} cannot have these embedding tables in {recipe.embeddings}: {reasons}; leave embeddings out"
    )


def _check_together(recipe: Recipe, opened: Opened, target: EngineTarget) -> None:
    """Raise `RecipeError` for overrides that tell linears apart which read one input: they are one layer in the engine."""
    groups: dict[str, dict[str, Override | None]] = {}
    for name, layer in opened.linears.items():
        last = [each for each in recipe.overrides if fnmatchcase(name, each.layers)]
        groups.setdefault(layer.group, {})[name] = last[-1] if last else None
    for members in groups.values():
        chosen = {each and (each.keep, each.scheme) for each in members.values()}
        if len(chosen) > 1:
            raise RecipeError(
                f"{', '.join(members)} are one layer in {target.name}, and overrides or --keep treat them differently; name "
                "all of them or none"
            )


def _differences(own: Recipe, changed: Recipe, target: EngineTarget) -> Iterator[str]:
    """A note on every scheme that was asked for and became another."""
    pairs = [
        (getattr(own, name), getattr(changed, name))
        for name in ("scheme", "embeddings", "head")
        if name in own.model_fields_set
    ]
    pairs += [(old.scheme, new.scheme) for old, new in zip(own.overrides, changed.overrides, strict=False)]
    for asked, found in dict.fromkeys(pairs):
        if asked is not None and asked != found:
            yield f"{asked} became {found}, the nearest scheme that {target.name} serves"


def target_of(name: str, opened: Opened) -> EngineTarget:
    """The engine called `name` for a model. Raises `RecipeError`."""
    engine = ENGINES[name]
    if engine.serves is None:
        serving = [each for each, one in ENGINES.items() if one.serves is not None]
        raise RecipeError(
            f"nothing is quantized for {name}, which only reads files; write one of {', '.join(serving)}"
        )
    forms = engine.serves
    if engine.casts_scales:
        forms = forms.with_scales(TYPES[config_type(opened.source.config)])
    floats, fitting = {}, []
    for layer, one in opened.linears.items():
        near = forms.nearest(StoredLayer(engine.usual, (one.out, one.width)))
        if near.scheme == "float":
            floats[layer] = near.reason
        else:
            fitting.append(one)
    if not fitting:
        raise RecipeError(
            f"{name} serves no linear of this model: {next(iter(floats.values()), 'there is none')}"
        )
    shape = math.gcd(*(one.out for one in fitting)), math.gcd(*(one.width for one in fitting))
    return EngineTarget(name, engine, forms, shape=shape, floats=floats)


def _check(recipe: Recipe, target: EngineTarget) -> None:
    """Raise `RecipeError` for settings that the files of an engine cannot hold."""
    if recipe.outliers is not None:
        raise RecipeError(f"{target.name} serves no 16-bit columns; leave outliers out")
    if recipe.embeddings is not None and not target.forms.embeddings:
        raise RecipeError(f"{target.name} serves embedding tables as floats; leave embeddings out")
    if recipe.head is not None and not target.engine.head:
        raise RecipeError(f"{target.name} serves the output head as floats; leave head out")
    calibration = recipe.calibration
    if calibration is None:
        return
    if calibration.inputs is not None:
        raise RecipeError(
            f"{target.name} is served with float activations here; leave calibration.inputs out"
        )
    if calibration.axis != "scheme":
        raise RecipeError(f"{target.name} has blocks along the inputs alone; leave calibration.axis out")
    if any(TRANSFORMS[name].turns_inner for name in calibration.transforms):
        raise RecipeError(
            f"{target.name} does not rotate activations while it runs; leave the transform out that turns them"
        )
