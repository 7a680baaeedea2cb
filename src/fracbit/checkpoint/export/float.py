"""`float`: every layer decoded to an ordinary weight, in a folder that plain transformers loads without fracbit.

Weights have the names of transformers' own modules: a `Conv1D` is transposed back, and the experts of a mixture are
fused into transformers' two tensors. Norms and other float tensors are copied as they are; a tied head has no tensor of
its own. The type is that of the source, or `float:bf16`, `float:fp16`, `float:fp32`. fracbit multiplies by weights
decoded to fp32, so only fp32 loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.export.exporter import Nearest, StoredModel, Written
from fracbit.checkpoint.export.pieces import Piece, Tensors, copied_piece, write_pieces
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.codes import SCALE_TYPES
from fracbit.checkpoint.output import Output
from fracbit.errors import FormatError, RecipeError, WeightError
from fracbit.models.blocks import is_transposed
from fracbit.models.experts import Cut, SplitExperts
from fracbit.models.origin import origins
from fracbit.numerics.packed import SCALE_DTYPES, decode
from fracbit.records.progress import Progress

STORED = {name: SCALE_DTYPES[kind] for name, kind in SCALE_TYPES.items()}
"""Types by their names in headers, the least precise first."""
PARAMETERS = tuple(SCALE_TYPES.values())


@dataclass(frozen=True)
class Mixture:
    """A tensor of all experts: its shape, and the parameters that it holds with their places in it."""

    shape: torch.Size
    parts: list[tuple[str, Cut]]


@dataclass(frozen=True)
class FloatWeights:
    """The format `float`; `dtype` None is the source's type."""

    dtype: torch.dtype | None = None

    def check(self, model: PreTrainedModel, folder: Path) -> None:
        """Every model can have plain weights."""

    def nearest(self, layer: StoredLayer) -> Nearest:
        """A plain model cannot rotate or round the inputs of a layer while it runs."""
        if layer.rotated:
            return Nearest(
                None,
                "its inputs are rotated while the model runs, which a plain model does not do; "
                "quantize without the transform rotate-mlp",
            )
        if layer.inputs is not None:
            return Nearest(
                None,
                f"its inputs are rounded to {layer.inputs} while the model runs, which a plain model does not do; "
                "quantize without inputs",
            )
        return Nearest(layer.scheme)

    def beside(self, model: PreTrainedModel, folder: Path) -> int:
        """See `Exporter`."""
        return 0

    def size(self, stored: StoredModel) -> int:
        """Bytes of all weights as floats."""
        return sum(piece.bytes for piece in self.pieces(stored))

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """Write the shards and their index; one shard is in memory at a time."""
        pieces = self.pieces(stored)
        _check_complete(stored, pieces)
        return Written(write_pieces(pieces, target, show), self._config(stored))

    def pieces(self, stored: StoredModel) -> list[Piece]:
        """Every tensor of the exported model."""
        dtype = self.dtype or source_dtype(stored)
        mixtures = _mixtures(stored)
        inside = {name for mixture in mixtures.values() for name, _ in mixture.parts}
        made = [
            _layer_piece(stored, name, layer, dtype)
            for name, layer in stored.disk.items()
            if f"{name}.weight" not in inside
        ]
        copied = [copied_piece(stored, name) for name in stored.rest if name not in inside]
        fused = [_fused_piece(stored, name, mixture, dtype) for name, mixture in mixtures.items()]
        return [*made, *fused, *copied]

    def _config(self, stored: StoredModel) -> dict[str, Any]:
        config = {
            name: value for name, value in stored.source.config.items() if name != "quantization_config"
        }
        if self.dtype is None:
            return config
        config.pop("torch_dtype", None)  # the name of older files
        return config | {"dtype": str(self.dtype).removeprefix("torch.")}


def export_float(parameter: str = "") -> FloatWeights:
    """The format `float` with its type. Raises `RecipeError` for an unknown type."""
    if parameter and parameter not in PARAMETERS:
        raise RecipeError(
            f"format float has no type {parameter!r}; write float (the type of the source), "
            f"{', '.join(f'float:{name}' for name in PARAMETERS)}"
        )
    return FloatWeights(SCALE_DTYPES[parameter] if parameter else None)


def source_dtype(stored: StoredModel) -> torch.dtype:
    """The least precise type of the float tensors, which have the types of the source; fp32 if there are none."""
    kinds = {stored.source.tensors[name].dtype for name in stored.rest}
    return next((dtype for name, dtype in STORED.items() if name in kinds), torch.float32)


def _layer_piece(stored: StoredModel, name: str, layer: StoredLayer, dtype: torch.dtype) -> Piece:
    size = layer.shape[0] * layer.shape[1] * dtype.itemsize
    transposed = layer.kind == "linear" and is_transposed(stored.model.get_submodule(name))

    def make() -> Tensors:
        weight = decoded(stored, name, dtype)  # [out, in]
        return {f"{name}.weight": weight.T.contiguous() if transposed else weight}, None

    return Piece(f"{name}.weight", size, make)


def _fused_piece(stored: StoredModel, fused: str, mixture: Mixture, dtype: torch.dtype) -> Piece:
    """One tensor of a mixture, put together from the experts' linears."""
    size = mixture.shape.numel() * dtype.itemsize

    def make() -> Tensors:
        whole = torch.zeros(mixture.shape, dtype=dtype)  # LongCat has rows of no expert
        for name, cut in mixture.parts:
            layer, _, leaf = name.rpartition(".")
            # [out, in], or [out] of a bias
            part = decoded(stored, layer, dtype) if leaf == "weight" else stored.tensor(name).to(dtype)
            cut.write(whole, part)
        return {fused: whole}, None

    return Piece(fused, size, make)


def decoded(stored: StoredModel, name: str, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a linear or a table, quantized or not. Raises `WeightError` where it overflows the type.

    One that becomes floats gets the type of the source's first, which every format stores it in.
    """
    if name not in stored.disk:
        return stored.tensor(f"{name}.weight").to(dtype)
    try:
        if name in stored.layers:
            weight = decode(stored.exported(name)[0], dtype)
        else:
            weight = decode(stored.packed(name), source_dtype(stored)).to(dtype)
    except FormatError as error:
        raise FormatError(f"{stored.source.name}: {error}") from error
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(f"layer {name}: a weight is too large for {dtype}; export float:bf16 or float:fp32")
    return weight


def _mixtures(stored: StoredModel) -> dict[str, Mixture]:
    """The fused tensors of mixtures, by name."""
    found: dict[str, Mixture] = {}
    for path, module in stored.model.named_modules():
        if isinstance(module, SplitExperts):
            for name, fused, cut in module.layout.cuts(len(module)):
                mixture = found.setdefault(f"{path}.{fused}", Mixture(module.shapes[fused], []))
                mixture.parts.append((f"{path}.{name}", cut))
    return found


def _check_complete(stored: StoredModel, pieces: Sequence[Piece]) -> None:
    """Raise `FormatError` unless transformers finds every tensor of its model under the names that will be written."""
    missing = origins(stored.model, [piece.name for piece in pieces]).missing
    if missing:
        raise FormatError(
            f"{stored.source.name} lacks {len(missing)} tensors of {type(stored.model).__name__}, such as {missing[0]}: "
            "it cannot be exported as a plain model; quantize it again"
        )
