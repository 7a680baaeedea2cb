"""`FloatModel`: a float model to experiment on, and `replaced`, which tries other weights and restores the old ones.

Experiments (what would 2 bits in this block cost? what does this noise do?) need no packed checkpoint. Dequantized
weights are put into the float model, and the old weights are restored afterwards, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.load import load_opened
from fracbit.checkpoint.opened import Opened, open_float
from fracbit.evaluation import Perplexity, perplexity
from fracbit.models.blocks import weight_of
from fracbit.models.experts import split_experts
from fracbit.models.family import Family
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.numerics import decode, quantize_tensor
from fracbit.pipeline.study.weights import Weights, weights_in_memory
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A float model in memory, by default in fp32, with its family and its linears."""

    model: PreTrainedModel
    family: Family
    weights: Weights

    def module(self, layer: str) -> nn.Module:
        """The linear called `layer`."""
        return self.model.get_submodule(layer)


def load_float(
    model: str | Path | Opened,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> FloatModel:
    """Load a float model to experiment on: a folder, a hub id, or a checkpoint that is open already.

    Raises `SourceError` when it cannot be read or is quantized already.
    """
    opened = model if isinstance(model, Opened) else open_float(model)
    return float_model_of(load_opened(opened, dtype, device))


def float_model_of(model: PreTrainedModel) -> FloatModel:
    """A loaded float model as one to experiment on; mixtures of experts are split into linears, in place."""
    split_experts(model)
    family = family_of(model)
    return FloatModel(model, family, weights_in_memory(model, family))


@contextmanager
def replaced(float_model: FloatModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which these layers have these weights [out, in]; the old ones are restored bit for bit."""
    kept = {name: weight_of(float_model.module(name)).clone() for name in weights}  # [out, in] each
    try:
        for name, weight in weights.items():
            set_weight(float_model.module(name), weight)
        yield
    finally:
        for name, weight in kept.items():
            set_weight(float_model.module(name), weight)


def rounded(float_model: FloatModel, schemes: Mapping[str, Scheme | None]) -> dict[str, Tensor]:
    """The weights after round-to-nearest under these schemes; layers that stay float (None) are left out."""
    return {
        name: decode(quantize_tensor(float_model.weights.read(name), scheme))
        for name, scheme in schemes.items()
        if scheme is not None
    }


def measure(
    float_model: FloatModel, ids: Tensor | Sequence[Tensor], window: int | None = None, batch: int = 8
) -> Perplexity:
    """Perplexity of the model as it is now; `ids` are documents or rows [samples, tokens], each read on its own."""
    documents = list(ids) if isinstance(ids, Tensor) and ids.dim() == 2 else ids  # [tokens] each
    return perplexity(float_model.model, documents, window=window, batch=batch)
