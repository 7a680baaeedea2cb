"""What a run will write: bytes and shapes of all tensors in the weight files, and bytes of the headers.

    units that share a budget: their bytes follow from their schemes (`Unit.bits`)
    the rest of the model: embeddings, head, norms, overridden layers; their bytes are fixed

No other module of the plan reads the items of a schedule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fracbit.checkpoint.format import tensor_name
from fracbit.checkpoint.opened import Opened
from fracbit.importance import Unit
from fracbit.models.blocks import blocks
from fracbit.numerics.packed import outlier_count, part_shapes
from fracbit.pipeline.quantize.schedule import FloatItem, Item, make_schedule
from fracbit.records.allocation import Allocation, allocated
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape, as the header of a file lists them."""


@dataclass(frozen=True)
class Rest:
    """What is written besides the layers that share a budget.

    - `bytes` and `shapes`: of its tensors; `quantized_bits` and `quantized_weights`: of its layers that have a scheme.
    - `schemes`: the scheme of every layer of the model by the recipe alone; layers that share the budget are float.
    - `shards`: number of weight files; `most_bytes`: of all tensors of the model, with every unit float.
    """

    bytes: int
    shapes: Shapes
    quantized_bits: int
    quantized_weights: int
    schemes: Mapping[str, Scheme | None]
    shards: int
    most_bytes: int


def rest_of(recipe: Recipe, opened: Opened, units: Sequence[Unit]) -> Rest:
    """All that is not in `units`, as `recipe` says. Raises `SourceError`, `RecipeError` as the run would."""
    floats = allocated(recipe, Allocation(dict.fromkeys(name for unit in units for name in unit.shapes)))
    schedule = make_schedule(floats, opened)
    own = {name for unit in units for name in unit.own}
    items = [item for items in schedule.shards.values() for item in items]
    others = [item for item in items if item.name.removesuffix(".weight") not in own]
    fixed = [each for item in others if (each := _fixed_unit(recipe, item)) is not None]
    bits = sum(unit.bits(scheme) for unit, scheme in fixed)
    plain = [item for item in others if isinstance(item, FloatItem)]
    shapes: dict[str, Sequence[int]] = {item.name: item.shape for item in plain}
    for one, scheme in fixed:
        shapes |= stored_shapes(one, scheme)
    return Rest(
        bytes=sum(item.bytes for item in plain) + bits // 8,
        shapes=shapes,
        quantized_bits=bits,
        quantized_weights=sum(unit.weights for unit, _ in fixed),
        schemes={name: decision.scheme for name, decision in schedule.decisions.items()},
        shards=_shards(recipe, opened, len(schedule.shards)),
        most_bytes=schedule.bytes,
    )


def as_run(recipe: Recipe, units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The units with what the run adds to their schemes: columns in 16 bits, an axis that it chooses."""
    share = 0.0 if recipe.outliers is None else recipe.outliers.share
    free = recipe.calibration is not None and recipe.calibration.axis != "scheme"
    return tuple(replace(unit, outliers=share, either_axis=free) for unit in units)


def _fixed_unit(recipe: Recipe, item: Item) -> tuple[Unit, Scheme] | None:
    """A quantized tensor outside the budget, as a unit, and its scheme; None for a tensor that stays float.

    `as_run` applies only to linears of the blocks.
    """
    if isinstance(item, FloatItem):
        return None
    unit = Unit(item.layer.name, {item.layer.name: item.stored.shape})
    return as_run(recipe, [unit])[0] if item.layer.kind == "linear" else unit, item.stored.scheme


def _shards(recipe: Recipe, opened: Opened, streamed: int) -> int:
    """Number of weight files: those of the schedule, or in a calibrated run one per block and one for the rest."""
    return streamed if recipe.calibration is None else 1 + len(blocks(opened.model, opened.family))


def written_bytes(units: Sequence[Unit], rest: Rest, schemes: Mapping[str, Scheme | None]) -> int:
    """Bytes of the weight files with these schemes: at least what will be written, at most 1 kB per shard more."""
    given = [(unit, schemes[next(iter(unit.shapes))]) for unit in units]
    names = dict(rest.shapes)
    for unit, scheme in given:
        names |= stored_shapes(unit, scheme)
    size = rest.bytes + sum(unit.bits(scheme) for unit, scheme in given) // 8
    return size + _header_bytes(names, size, rest.shards)


def most_bytes_beside(units: Sequence[Unit], rest: Rest, levels: Sequence[Scheme | None]) -> int:
    """The most bytes in the files besides the units: the rest, and headers with every part that any level stores."""
    names = dict(rest.shapes)
    for unit in units:
        for level in levels:
            names |= stored_shapes(unit, level)
    return rest.bytes + _header_bytes(names, rest.most_bytes, rest.shards)


def stored_shapes(unit: Unit, scheme: Scheme | None) -> dict[str, tuple[int, ...]]:
    """The tensors of a unit in the file, by name, and how the header writes their shapes."""
    names: dict[str, tuple[int, ...]] = {}
    for layer in unit.own:
        shape = unit.shapes[layer]
        if scheme is None:
            names[f"{layer}.weight"] = shape
            continue
        columns = outlier_count(shape[1], unit.outliers) if unit.outliers else 0
        for part, (_, size) in part_shapes(scheme, shape, columns).items():
            names[tensor_name(layer, part)] = (math.prod(size),) if part == "codes" else size
    return names


def _header_bytes(names: Shapes, size: int, shards: int) -> int:
    """Bytes of safetensors headers that list these tensors, every offset with as many digits as the largest."""
    entries = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size]}
        for name, shape in names.items()
    }
    return len(json.dumps(entries, separators=(",", ":"))) + 64 * shards
