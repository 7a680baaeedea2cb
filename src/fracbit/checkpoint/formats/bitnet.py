"""BitNet b1.58 in packed form, as transformers saves it: ternary weights of 2 bits and one scale for a matrix.

    weight uint8 [out / 4, in]   weight_scale [1]         w = (code - 1) * scale, or / scale where linear_class is bitlinear

The lowest bits of a byte belong to the first quarter of the outputs, the next to the second: a weight is decoded whole. Weights
that are stored as floats and made ternary while the model runs (quantization_mode online) are not decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo
from fracbit.errors import SourceError

WEIGHT, SCALE = ".weight", ".weight_scale"
QUARTERS = 4
"""Outputs in a byte."""
NOTE = (
    "the source rounds the activations of its layers while it runs; the decoded weights are used without that"
)


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether bytes have one float scale beside them."""
    return any(
        info.dtype == "U8"
        and name.endswith(WEIGHT)
        and (scale := tensors.get(f"{name}_scale")) is not None
        and scale.dtype in FLOATS
        and prod(scale.shape) == 1
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every packed layer. Raises `SourceError` naming a tensor that is missing or does not fit."""
    layers = [
        name.removesuffix(WEIGHT)
        for name, info in source.tensors.items()
        if info.dtype == "U8" and name.endswith(WEIGHT)
    ]
    if not layers:
        return Decoded("", {})
    if settings.get("use_rms_norm"):
        raise SourceError(
            f"{source.name} normalizes the inputs of every layer within it (use_rms_norm), which a plain model does not; start "
            "from the float model"
        )
    divides = str(settings.get("linear_class") or "bitlinear") == "bitlinear"
    found = {layer + WEIGHT: _decoding(source, layer, divides) for layer in layers}
    return Decoded("BitNet, ternary in 2 bits", found, notes=(NOTE,))


def _decoding(source: Source, layer: str, divides: bool) -> Decoding:
    codes, scale = source.tensors[layer + WEIGHT], source.tensors.get(layer + SCALE)
    if scale is None or prod(scale.shape) != 1 or scale.dtype not in FLOATS or len(codes.shape) != 2:
        held = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise SourceError(
            f"{source.name}: {layer}{WEIGHT} is U8 {list(codes.shape)} and its weight_scale {held}; ternary weights are U8 "
            "[out / 4, in] with one number: fetch the checkpoint again"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None, None]
        ternary = ((parts["codes"] >> shifts) & 3).flatten(0, 1).float() - 1  # [out, in]
        one = parts["scale"].float()
        return ternary / one if divides else ternary * one

    parts = {"codes": Part(layer + WEIGHT), "scale": Part(layer + SCALE)}
    shape = (QUARTERS * codes.shape[0], codes.shape[1])
    info = TensorInfo(codes.file, decoded_type(source, scale), shape)
    return Decoding(info, parts, values, scheme="ternary in 2 bits, one scale")


BITNET = SourceFormat(seen, decode)
