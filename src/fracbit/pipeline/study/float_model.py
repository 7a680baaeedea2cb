"""`FloatModel`: a float model to experiment on, and `replaced`, which tries other weights in it and puts the old ones back.

What-if questions (what would 2 bits in this block cost? what does this noise do?) need no packed checkpoint: dequantized
weights go into the float model in place, the kept copies come back afterwards, also when something raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.load import load
from fracbit.checkpoint.source import open_source, read_rows, read_tensor
from fracbit.errors import SourceError
from fracbit.evaluation import Perplexity, perplexity
from fracbit.importance import Granularity, LayerShape, Unit, make_units
from fracbit.models.blocks import weight_of
from fracbit.models.experts import split_experts
from fracbit.models.family import Family
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.models.skeleton import Layer, origins, quantizable, skeleton
from fracbit.numerics import decode, quantize_tensor
from fracbit.pipeline.plan.sampling import WEIGHTS as SAMPLE
from fracbit.pipeline.quantize.stream import model_config
from fracbit.records.scheme import Scheme
from fracbit.records.scores import fingerprint

SAMPLED = 1024


@dataclass(frozen=True, eq=False)
class Weights:
    """The linears of a model by name, and `read`, which gives a weight as fp32 [out, in], from memory or from the disk.

    `rows` gives some of its rows, fp32 [rows, in]; `sample`: weights of a linear that data-free scores look at, None: all.
    """

    layers: Mapping[str, Layer]
    blocks: str
    read: Callable[[str], Tensor]
    rows: Callable[[str, Sequence[slice]], Tensor]
    sample: int | None = None

    @cached_property
    def model(self) -> str:
        """Fingerprint: names, shapes, and some weights of the first, middle and last linear."""
        names = list(self.layers)
        some = (names[i] for i in sorted({0, len(names) // 2, len(names) - 1}))
        sample = b"".join(_some_of(self.read(name)).numpy().tobytes() for name in some)
        return fingerprint(((name, (layer.out, layer.width)) for name, layer in self.layers.items()), sample)

    def units(
        self, granularity: Granularity = "block", fused: bool = False, without: Collection[str] = ()
    ) -> tuple[Unit, ...]:
        """The linears, but those named in `without`, gathered into units that get their scheme together."""
        shapes = [
            LayerShape(
                layer.name, (layer.out, layer.width), f"{self.blocks}.{layer.block}", layer.group, layer.tied
            )
            for layer in self.layers.values()
            if layer.name not in without
        ]
        return make_units(shapes, granularity, fused)


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A float model in memory, in fp32, with its family and its linears."""

    model: PreTrainedModel
    family: Family
    weights: Weights

    def module(self, layer: str) -> nn.Module:
        """The linear called `layer`."""
        return self.model.get_submodule(layer)


def weights_on_disk(model: str | Path, trust_remote_code: bool = False, whole: bool = False) -> Weights:
    """The linears of a checkpoint, each read when it is asked for; the model is never in memory. Raises `SourceError`.

    Data-free scores look at a sample of the rows of large ones (sampling.py), at all of them when `whole`.
    """
    source = open_source(str(model), None, trust_remote_code)
    if "quantization_config" in source.config:
        raise SourceError(f"{model} is quantized already; score the float model that it was made from")
    shell = skeleton(model_config(source, trust_remote_code), trust_remote_code=trust_remote_code)
    family = family_of(shell)
    layers = quantizable(shell, family)
    places = origins(shell, source.tensors).tensors

    def read(name: str) -> Tensor:
        place = places.get(f"{name}.weight")
        if place is None:
            raise SourceError(f"{model} holds no weight for {name}")
        tensor = place.read(read_tensor(source, place.name))
        return (tensor.T if layers[name].transposed else tensor).float().contiguous()

    def some(name: str, rows: Sequence[slice]) -> Tensor:
        place = places.get(f"{name}.weight")
        if place is None or place.expert is not None or place.half is not None:
            return _rows_of(read(name), rows)
        axis = 1 if layers[name].transposed else 0
        tensor = read_rows(source, place.name, rows, axis)
        return (tensor.T if axis else tensor).float().contiguous()

    return Weights(layers, family.blocks, read, some, None if whole else SAMPLE)


def load_float(model: str | Path, device: str = "cpu", trust_remote_code: bool = False) -> FloatModel:
    """Load a float model to experiment on. Raises `SourceError` when it is quantized already or cannot be read."""
    if "quantization_config" in open_source(str(model), None, trust_remote_code).config:
        raise SourceError(
            f"{model} is quantized already; experiment on the float model that it was made from"
        )
    return float_model_of(load(model, torch.float32, device, trust_remote_code))


def float_model_of(model: PreTrainedModel) -> FloatModel:
    """A loaded float model as a subject; mixtures of experts are split into linears, in place."""
    split_experts(model)
    family = family_of(model)
    layers = quantizable(model, family)

    def read(name: str) -> Tensor:
        return weight_of(model.get_submodule(name)).float()

    return FloatModel(
        model, family, Weights(layers, family.blocks, read, lambda name, rows: _rows_of(read(name), rows))
    )


def _some_of(weight: Tensor) -> Tensor:
    """About `SAMPLED` weights, evenly over all."""
    flat = weight.flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()


def _rows_of(weight: Tensor, rows: Sequence[slice]) -> Tensor:
    return torch.cat([weight[cut] for cut in rows])


@contextmanager
def replaced(subject: FloatModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these weights [out, in] in these layers; on leaving, the ones it had, bit for bit."""
    kept = {name: weight_of(subject.module(name)).clone() for name in weights}
    try:
        for name, weight in weights.items():
            set_weight(subject.module(name), weight)
        yield
    finally:
        for name, weight in kept.items():
            set_weight(subject.module(name), weight)


def rounded(subject: FloatModel, schemes: Mapping[str, Scheme | None]) -> dict[str, Tensor]:
    """What round-to-nearest leaves of the weights under these schemes; layers that stay float (None) are left out."""
    return {
        name: decode(quantize_tensor(subject.weights.read(name), scheme))
        for name, scheme in schemes.items()
        if scheme is not None
    }


def measure(
    subject: FloatModel, ids: Tensor | Sequence[Tensor], window: int | None = None, batch: int = 8
) -> Perplexity:
    """Perplexity of the model as it stands; `ids` are documents or rows of a matrix, each seen on its own."""
    documents = list(ids) if isinstance(ids, Tensor) and ids.dim() == 2 else ids
    return perplexity(subject.model, documents, window=window, batch=batch)
