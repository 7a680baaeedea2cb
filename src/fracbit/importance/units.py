"""`Unit`: the layers that get their scheme together, and what each scheme would cost them in stored bits.

The layer-wise paper (arXiv:2406.17415) chooses for whole blocks; single linears are finer. Linears that are one tensor (tied)
must be kept together, those that an engine fuses (q, k, v; gate, up) are on request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias, get_args

from fracbit.errors import RecipeError, check_choice
from fracbit.numerics.packed import outlier_count, part_shapes
from fracbit.records.scheme import Axis, Scheme
from fracbit.records.spending import Granularity

Choices: TypeAlias = Sequence[Scheme | None]
FLOAT_BITS = 16


@dataclass(frozen=True)
class LayerShape:
    """A linear as an allocation sees it: `shape` [out, in], the `block` it is in, the `group` of linears that read its input.

    `tied` names the layer that owns the tensor when this one only shares it: it costs nothing, and gets the owner's scheme.
    """

    name: str
    shape: tuple[int, int]
    block: str
    group: str
    tied: str | None = None


@dataclass(frozen=True)
class Unit:
    """Layers with one scheme. `shapes`: layer name -> [out, in]; `shared`: those of them that are tied to another.

    `outliers`: share of the input columns kept in 16 bits; `either_axis`: whether the run chooses the axis of the blocks.
    `levels`: those that the unit may have, None for all.
    """

    name: str
    shapes: Mapping[str, tuple[int, int]]
    shared: frozenset[str] = field(default_factory=frozenset)
    outliers: float = 0.0
    either_axis: bool = False
    levels: frozenset[Scheme | None] | None = None

    def takes(self, scheme: Scheme | None) -> bool:
        """Whether the unit may have this level."""
        return self.levels is None or scheme in self.levels

    @property
    def own(self) -> tuple[str, ...]:
        """The layers that hold a tensor of their own: all but the tied ones."""
        return tuple(name for name in self.shapes if name not in self.shared)

    @property
    def weights(self) -> int:
        """Weights stored, tied ones counted once."""
        return sum(math.prod(self.shapes[name]) for name in self.own)

    def bits(self, scheme: Scheme | None) -> int:
        """Bits that the unit takes on disk under `scheme`: codes, scales, offsets, tables and padding; 16 a weight for None."""
        return sum(
            scheme_bits(scheme, self.shapes[name], self.outliers, self.either_axis) for name in self.own
        )


@lru_cache(maxsize=4096)
def scheme_bits(
    scheme: Scheme | None, shape: tuple[int, int], outliers: float = 0.0, either_axis: bool = False
) -> int:
    """Stored bits of a weight [out, in] under `scheme`, exactly those that `numerics.stored_bits` will count.

    A share `outliers` of its columns is kept in 16 bits; of `either_axis`, the dearer counts.
    """
    if scheme is None:
        return FLOAT_BITS * shape[0] * shape[1]
    sixteen = outlier_count(shape[1], outliers) if outliers else 0
    schemes = [replace(scheme, axis=axis) for axis in get_args(Axis)] if either_axis else [scheme]
    return max(
        sum(
            8 * kinds[0].itemsize * math.prod(size)
            for kinds, size in part_shapes(each, shape, sixteen).values()
        )
        for each in schemes
    )


def make_units(
    layers: Iterable[LayerShape], granularity: Granularity = "block", fused: bool = False
) -> tuple[Unit, ...]:
    """Gather layers into units, in the order of the model; `fused` keeps linears that read one input together.

    Raises `RecipeError` for another granularity, and when a layer is tied to one that is not there.
    """
    check_choice("granularity", granularity, get_args(Granularity))
    layers = list(layers)
    by_name = {layer.name: layer for layer in layers}
    members: dict[str, list[LayerShape]] = {}
    for layer in layers:
        if layer.tied is not None and layer.tied not in by_name:
            raise RecipeError(
                f"{layer.name} is tied to {layer.tied}, which is not among the layers; quantize both or neither"
            )
        owner = by_name[layer.tied] if layer.tied is not None else layer
        members.setdefault(_key(owner, granularity, fused), []).append(layer)
    return tuple(_unit(key, some) for key, some in members.items())


def cost_table(units: Sequence[Unit], choices: Choices) -> list[dict[int, int]]:
    """Stored bits of every unit, by the numbers of the choices that it may have."""
    return [
        {i: unit.bits(scheme) for i, scheme in enumerate(choices) if unit.takes(scheme)} for unit in units
    ]


def _unit(name: str, layers: Sequence[LayerShape]) -> Unit:
    shared = frozenset(layer.name for layer in layers if layer.tied is not None)
    return Unit(name, {layer.name: layer.shape for layer in layers}, shared)


def _key(layer: LayerShape, granularity: Granularity, fused: bool) -> str:
    if granularity == "block":
        return layer.block
    return layer.group if fused else layer.name
