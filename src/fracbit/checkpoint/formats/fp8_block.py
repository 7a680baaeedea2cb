"""Floats of 8 bits with scales beside them, as DeepSeek releases its models: `quant_method` fp8.

    weight [..., out, in] F8_E4M3, weight_scale_inv [..., ceil(out / 128), ceil(in / 128)]      w = code * scale

A scale may also belong to a row, an expert, or the whole tensor, and be a power of two (F8_E8M0, or its exponent in U8). Other
programs call it `weight_scale`; it multiplies too. Scales of activations (`input_scale`) are for run time only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fracbit.checkpoint.formats.codes import block_of, decoded_type, spread
from fracbit.checkpoint.formats.decoding import NUMBERS, POWERS, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
INPUTS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub")
DEFAULT = (128, 128)


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether floats of 8 bits have their scales beside them."""
    return any(info.dtype in CODES and _scale_of(name, tensors) for name, info in tensors.items())


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every tensor of 8-bit floats. Raises `SourceError` where a scale is missing, left over or of a wrong shape."""
    tensors = source.tensors
    codes = {name: info for name, info in tensors.items() if info.dtype in CODES}
    if not codes:
        return Decoded("", {})
    found = {name: _decoding(source, name, settings) for name in codes}
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    for name in tensors:
        if name.endswith(("_scale_inv", ".weight_scale")) and name not in parts:
            raise SourceError(
                f"{source.name} holds {name} and no 8-bit floats that belong to it; fetch the checkpoint again"
            )
    unused = frozenset(name for name in tensors if name.endswith(INPUTS))
    return Decoded("block fp8, 8 bits", found, unused)


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    return next((name + ending for ending in SCALES if name + ending in tensors), "")


def _decoding(source: Source, name: str, settings: Mapping[str, Any]) -> Decoding:
    info = source.tensors[name]
    beside = _scale_of(name, source.tensors)
    if not beside:
        raise SourceError(
            f"{source.name} holds {name} in {info.dtype} and no {name}{SCALES[0]}: without its scale it is another tensor; "
            "fetch the checkpoint again"
        )
    grid = source.tensors[beside]
    asked = settings.get("weight_block_size")
    if asked and not (
        isinstance(asked, (list, tuple))
        and len(asked) == 2
        and all(isinstance(n, int) and n > 0 for n in asked)
    ):
        raise SourceError(
            f"weight_block_size in config.json should be two numbers, such as [128, 128]; got {asked!r}"
        )
    block = block_of(info.shape, grid.shape, (asked[0], asked[1]) if asked else None, DEFAULT)
    if block is None:
        raise SourceError(
            f"{source.name}: {beside} has shape {list(grid.shape)}, which is no grid of scales for {name} {list(info.shape)} "
            f"in blocks of {list(asked or DEFAULT)}; compare weight_block_size in config.json with the released one"
        )
    rows = block[0] if len(info.shape) == 2 else 1

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"].float()  # [..., out, in]
        return codes * spread(scale_values(parts["scale"]), codes.shape, block)

    whole = grid.shape[0] == 1 if grid.shape else True
    kinds = (*NUMBERS, *POWERS)
    parts = {
        "codes": Part(name, rows=1, kinds=CODES),
        "scale": Part(beside, rows=0 if whole else rows, kinds=kinds),
    }
    scheme = f"fp8, {block[0]} x {block[1]}"
    found = TensorInfo(info.file, decoded_type(source, grid), info.shape)
    return Decoding(found, parts, values, scheme=scheme)


FP8_BLOCK = SourceFormat(seen, decode)
