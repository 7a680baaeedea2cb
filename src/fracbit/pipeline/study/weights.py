"""`Weights`: the linears of a model, each read when it is asked for, from the disk or from a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.source import read_rows, read_tensor
from fracbit.errors import SourceError
from fracbit.importance import LayerShape, Unit, make_units
from fracbit.models.blocks import weight_of
from fracbit.models.family import Family
from fracbit.models.origin import Origin
from fracbit.models.skeleton import Layer, quantizable
from fracbit.records.scores import fingerprint
from fracbit.records.spending import Granularity

SAMPLED = 1 << 18
"""Weights of a linear that data-free scores read, unless they are asked to read all."""
HASHED = 1024  # weights of a linear that are in the fingerprint


@dataclass(frozen=True, eq=False)
class Weights:
    """The linears of a model by name, and `read`, which gives a weight as fp32 [out, in].

    `rows` gives some of its rows, fp32 [rows, in]; `blocks` is the path of the list of blocks; `sample`: how many
    weights of a linear data-free scores read, None: all.
    """

    layers: Mapping[str, Layer]
    blocks: str
    read: Callable[[str], Tensor]
    rows: Callable[[str, Sequence[slice]], Tensor]
    sample: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model: names, shapes, and some weights of the first, middle and last linear."""
        names = list(self.layers)
        some = (names[i] for i in sorted({0, len(names) // 2, len(names) - 1}))
        sample = b"".join(_some_of(self.read(name)).numpy().tobytes() for name in some)
        return fingerprint(self.shapes.items(), sample)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every linear."""
        return {name: (layer.out, layer.width) for name, layer in self.layers.items()}

    def units(
        self, granularity: Granularity = "block", fused: bool = False, without: Collection[str] = ()
    ) -> tuple[Unit, ...]:
        """The linears, except those in `without`, grouped into units that get one scheme."""
        shapes = [
            LayerShape(
                layer.name,
                (layer.out, layer.width),
                block=f"{self.blocks}.{layer.block}",
                group=layer.group,
                tied=layer.tied,
            )
            for layer in self.layers.values()
            if layer.name not in without
        ]
        return make_units(shapes, granularity, fused)


def weights_on_disk(opened: Opened, whole: bool = False) -> Weights:
    """The linears of a checkpoint; the model is never in memory. Raises `SourceError` when a weight is missing or cut short.

    Data-free scores read a sample of the rows of large linears (plan/sampling.py), or all rows with `whole`.
    """
    layers, source = opened.linears, opened.source

    def place_of(name: str) -> Origin:
        place = opened.origins.tensors.get(f"{name}.weight")
        if place is None:
            raise SourceError(f"{source.name} holds no weight for {name}")
        return place

    # The last stack of experts: the next layer is likely another part of it.
    stacks: dict[Origin, Tensor] = {}

    def read(name: str) -> Tensor:
        place, transposed = place_of(name), layers[name].transposed
        stack = replace(place, cut=None)
        if stack not in stacks:
            stacks.clear()
            joined = place.joined([read_tensor(source, each) for each in place.names])
            if place.cut is None:
                return _upright(joined, transposed)  # [out, in]
            stacks[stack] = joined
        return _upright(place.part_of(stacks[stack]), transposed)  # [out, in]

    def rows(name: str, cuts: Sequence[slice]) -> Tensor:
        place, transposed = place_of(name), layers[name].transposed
        if place.plain is None:  # a part of a tensor on disk, or joined from several
            return _rows_of(read(name), cuts)  # [rows, in]
        return _upright(read_rows(source, place.plain, cuts, axis=int(transposed)), transposed)  # [rows, in]

    return Weights(layers, opened.family.blocks, read, rows, sample=None if whole else SAMPLED)


def weights_in_memory(model: PreTrainedModel, family: Family) -> Weights:
    """The linears of a model in memory, as they are when they are read; scores read all rows."""

    def read(name: str) -> Tensor:
        return weight_of(model.get_submodule(name)).float()  # [out, in]

    return Weights(
        quantizable(model, family), family.blocks, read, lambda name, cuts: _rows_of(read(name), cuts)
    )


def _upright(weight: Tensor, transposed: bool) -> Tensor:
    """fp32 [out, in] of a weight that may be stored as [in, out]."""
    return (weight.T if transposed else weight).float().contiguous()


def _some_of(weight: Tensor) -> Tensor:
    """About `HASHED` weights, evenly over all."""
    flat = weight.flatten()  # [out * in]
    return flat[:: max(1, len(flat) // HASHED)].clone()


def _rows_of(weight: Tensor, cuts: Sequence[slice]) -> Tensor:
    return torch.cat([weight[cut] for cut in cuts])  # [rows, in]
