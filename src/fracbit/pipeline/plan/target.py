"""A run for an engine: recipe and budget with only the schemes that the engine serves, for the shapes of the model at hand.

    what was asked for -> the nearest forms that the engine serves -> recipe, budget, notes on every difference

Whatever chooses codes then fills the very grid that the engine reads, and the export writes it without rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from fracbit.checkpoint.export.exporter import FORMATS
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.codes import SCALE_TYPES, config_type
from fracbit.checkpoint.opened import Opened
from fracbit.engines.engine import ENGINES, Forms, ServingEngine
from fracbit.errors import RecipeError
from fracbit.pipeline.plan.about import bits_about
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending, not_served
from fracbit.transforms import TRANSFORMS

NEAREST, WITHIN = 3, 2.0  # widths around a budget: so many at least, and all that are so many bits away
TABLE = Scheme("int:step", 8, 64)
"""What an embedding table gets where the engine serves quantized ones and nothing else was asked for."""


@dataclass(frozen=True, eq=False)
class EngineTarget:
    """An engine and the linears of a model. `forms`: what it serves; `shapes`: [out, in] of the linears that it can serve
    quantized; `floats`: why it can only have the others as floats.
    """

    name: str
    engine: ServingEngine
    forms: Forms
    shapes: Mapping[str, tuple[int, int]]
    floats: Mapping[str, str]

    def scheme(self, asked: Scheme, shape: tuple[int, int]) -> Scheme:
        """The nearest scheme that the engine serves for a linear of this shape. Raises `RecipeError`."""
        near = self.forms.nearest(StoredLayer(asked, shape))
        if not isinstance(near.scheme, Scheme):
            raise RecipeError(f"{self.name} serves nothing near {asked} for this model: {near.reason}")
        return near.scheme

    def schemes(self, asked: Scheme) -> dict[str, Scheme]:
        """What every linear gets in place of the scheme that was asked for."""
        found = {shape: self.scheme(asked, shape) for shape in set(self.shapes.values())}
        return {name: found[shape] for name, shape in self.shapes.items()}

    def main(self, schemes: Mapping[str, Scheme]) -> Scheme:
        """The scheme that most weights get."""
        weights: Counter[Scheme] = Counter()
        for name, scheme in schemes.items():
            weights[scheme] += math.prod(self.shapes[name])
        return weights.most_common(1)[0][0]

    def levels(self, asked: Iterable[Scheme | None]) -> dict[tuple[int, int], tuple[Scheme | None, ...]]:
        """For every shape of a linear, the schemes near those asked for, without repeats."""
        asked = tuple(asked)
        return {
            shape: tuple(
                dict.fromkeys(None if level is None else self.scheme(level, shape) for level in asked)
            )
            for shape in set(self.shapes.values())
        }

    def own_levels(self, average: float | None) -> dict[tuple[int, int], tuple[Scheme | None, ...]]:
        """What a budget chooses from where nothing else was asked for: the widths nearest to its average, at every block.

        Floats too where the engine serves a single width.
        """
        return {shape: _near(found, average) for shape, found in self.levels(self.forms.levels).items()}


def _near(levels: Sequence[Scheme | None], average: float | None) -> tuple[Scheme | None, ...]:
    widths = sorted({one.bits for one in levels if one})
    if average is not None:
        away = {bits: abs(bits + 0.5 - average) for bits in widths}
        nearest = sorted(widths, key=away.__getitem__)[:NEAREST]
        widths = [bits for bits in widths if bits in nearest or away[bits] <= WITHIN]
    kept = tuple(one for one in levels if one and one.bits in widths)
    return (*kept, None) if len(widths) == 1 else kept


@dataclass(frozen=True)
class Served:
    """A recipe and a budget for an engine, with notes on what was asked for and is not served.

    `levels`: those that each linear may have, where that differs among linears.
    """

    recipe: Recipe
    spending: Spending
    notes: tuple[str, ...] = ()
    levels: Mapping[str, frozenset[Scheme | None]] = field(default_factory=dict)


def for_engine(recipe: Recipe, spending: Spending, opened: Opened, *, own: Recipe) -> Served:
    """The recipe and budget for the engine that `spending` names. Without an engine nothing changes.

    `own`: the recipe before a preset filled it, whose schemes were asked for.
    Raises `RecipeError` for what the engine does not serve and nothing near would do.
    """
    if spending.engine is None:
        return Served(recipe, spending)
    target = target_of(spending.engine, opened)
    spending, beside = _of_tensors(spending, opened, target)
    _check(recipe, target)
    if target.engine.fused:
        _check_together(recipe, opened, target)
    overrides, notes = _overrides(recipe, target)
    changes: dict[str, object] = {}
    if not spending.asked:
        asked = recipe.scheme if "scheme" in recipe.model_fields_set else target.engine.usual
        given = target.schemes(asked)
        changes["scheme"] = main = target.main(given)
        overrides = (*_others(given, main), *overrides)
        if "scheme" in own.model_fields_set:
            notes = (*_became(asked, given, target), *notes)
    changes["overrides"] = overrides
    if target.forms.embeddings:
        changes["embeddings"] = _table(recipe, opened, target)
    if recipe.head is not None:
        changes["head"] = _head(recipe.head, opened, target)
    changed = recipe.model_copy(update=changes)
    floats = (f"{name} stays float: {why}" for name, why in target.floats.items())
    notes = (*beside, *_differences(own, changed, target), *notes, *floats)
    if not spending.asked:
        return Served(changed, Spending(), notes)
    average = bits_about(spending, recipe, opened, embeddings=target.forms.embeddings)
    return _divided(Served(changed, spending, notes), target, average)


def _of_tensors(spending: Spending, opened: Opened, target: EngineTarget) -> tuple[Spending, tuple[str, ...]]:
    """The budget less what the file holds beside tensors, with a note on it. Raises `FormatError` for an unfit model."""
    exporter = FORMATS[target.engine.formats[0]]("")
    exporter.check(opened.model, opened.source.folder)
    if spending.size_bytes is None:
        return spending, ()
    beside = exporter.beside(opened.model, opened.source.folder)
    note = f"{beside / 1e6:.2f} MB of the size are kept for the tokenizer and names in the file"
    return replace(spending, size=max(1, spending.size_bytes - beside)), (note,) if beside else ()


def _divided(served: Served, target: EngineTarget, average: float | None) -> Served:
    """The same with the levels that a budget of `average` bits or so chooses from, linear by linear."""
    spending = served.spending
    found = target.levels(spending.schemes) if spending.levels is not None else target.own_levels(average)
    every = tuple(dict.fromkeys(level for shape in sorted(found) for level in found[shape]))
    some = {name: frozenset(found[shape]) for name, shape in target.shapes.items()}
    fused = spending.fused or target.engine.fused
    return replace(
        served,
        spending=replace(spending, engine=None, levels=every, fused=fused),
        levels={} if len(set(some.values())) == 1 else some,
    )


def _others(schemes: Mapping[str, Scheme], main: Scheme) -> tuple[Override, ...]:
    """An override for every linear that does not get the `main` scheme."""
    return tuple(Override(layers=name, scheme=scheme) for name, scheme in schemes.items() if scheme != main)


def _overrides(recipe: Recipe, target: EngineTarget) -> tuple[tuple[Override, ...], tuple[str, ...]]:
    """The recipe's, with schemes that the engine serves, and what it can only have as floats; notes on what became of them."""
    made: list[Override] = []
    notes: list[str] = []
    for each in recipe.overrides:
        named = [name for name in target.shapes if fnmatchcase(name, each.layers)]
        if each.scheme is None or not named:
            made.append(each)
            continue
        given = {name: scheme for name, scheme in target.schemes(each.scheme).items() if name in named}
        main = target.main(given)
        made += [each.model_copy(update={"scheme": main}), *_others(given, main)]
        notes += _became(each.scheme, given, target)
    return (*made, *(Override(layers=name, keep=True) for name in target.floats)), tuple(dict.fromkeys(notes))


def _became(asked: Scheme, given: Mapping[str, Scheme], target: EngineTarget) -> Iterator[str]:
    """A note on the schemes that linears get in place of the one that was asked for."""
    found = dict.fromkeys(given.values())
    if list(found) == [asked]:
        return
    nearest = "schemes" if len(found) > 1 else "scheme"
    yield f"{asked} became {' or '.join(map(str, found))}, the nearest {nearest} that {target.name} serves"


def _head(asked: Scheme, opened: Opened, target: EngineTarget) -> Scheme:
    """The scheme of the output head."""
    heads = [(one.out, one.width) for one in opened.layers.values() if one.kind == "head"]
    return target.scheme(asked, heads[0]) if heads else asked


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
    """Notes on the schemes of embedding tables and of the head that were asked for and became others."""
    pairs = [
        (getattr(own, name), getattr(changed, name))
        for name in ("embeddings", "head")
        if name in own.model_fields_set
    ]
    for asked, found in dict.fromkeys(pairs):
        if asked is not None and asked != found:
            yield f"{asked} became {found}, the nearest scheme that {target.name} serves"


def target_of(name: str, opened: Opened) -> EngineTarget:
    """The engine called `name` for a model. Raises `RecipeError`."""
    engine = ENGINES[name]
    if engine.serves is None:
        raise not_served(name)
    forms = engine.serves
    if engine.casts_scales:
        forms = forms.with_scales(SCALE_TYPES[config_type(opened.source.config)])
    floats, shapes = {}, {}
    for layer, one in opened.linears.items():
        near = forms.nearest(StoredLayer(engine.usual, (one.out, one.width)))
        if near.scheme == "float":
            floats[layer] = near.reason
        else:
            shapes[layer] = (one.out, one.width)
    if not shapes:
        raise RecipeError(
            f"{name} serves no linear of this model: {next(iter(floats.values()), 'there is none')}"
        )
    return EngineTarget(name, engine, forms, shapes=shapes, floats=floats)


def _check(recipe: Recipe, target: EngineTarget) -> None:
    """Raise `RecipeError` for settings that the files of an engine cannot hold."""
    if recipe.outliers is not None:
        raise RecipeError(f"{target.name} serves no 16-bit columns; leave outliers out")
    if recipe.embeddings is not None and not target.forms.embeddings:
        raise RecipeError(f"{target.name} serves embedding tables as floats; leave embeddings out")
    if recipe.head is not None and not target.engine.head:
        raise RecipeError(f"{target.name} serves the output head as floats; leave head out")
    if recipe.towers is not None:
        raise RecipeError(f"{target.name} serves towers for images and sound as floats; leave towers out")
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
