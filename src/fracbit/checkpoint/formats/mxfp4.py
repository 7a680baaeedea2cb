"""MXFP4 as gpt-oss releases its experts: floats of 4 bits in blocks of 32 that share a power of two.

    gate_up_proj_blocks uint8 [experts, 2 inner, in / 32, 16]   gate_up_proj_scales uint8 [experts, 2 inner, in / 32]

A byte holds two E2M1 codes, the first in its low half; a scale is an exponent with a bias of 127. transformers keeps these
weights as [experts, in, 2 inner], and so they are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fracbit.checkpoint.formats.codes import config_type, fp4_values
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16
"""Of a block of 32 codes."""


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether blocks and scales lie side by side."""
    return any(
        name.endswith(BLOCKS) and info.dtype == "U8" and _scales_of(name) in tensors
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """The experts of every block. Raises `SourceError` naming a tensor that is missing or does not fit."""
    tensors = source.tensors
    blocks = [name for name, info in tensors.items() if name.endswith(BLOCKS) and info.dtype == "U8"]
    found = {name.removesuffix(BLOCKS): _decoding(source, name) for name in blocks}
    scales = [name for name, info in tensors.items() if name.endswith(SCALES) and info.dtype == "U8"]
    left = [name for name in scales if name.removesuffix(SCALES) not in found]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]} and no blocks that belong to it; fetch the checkpoint again"
        )
    return Decoded("MXFP4, 4 bits", found)


def _scales_of(blocks: str) -> str:
    return blocks.removesuffix(BLOCKS) + SCALES


def _decoding(source: Source, name: str) -> Decoding:
    beside = _scales_of(name)
    if beside not in source.tensors:
        raise SourceError(
            f"{source.name} holds {name} and no {beside}: without its scales it is another tensor; fetch the checkpoint again"
        )
    blocks, scales = source.tensors[name], source.tensors[beside]
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BYTES) and scales.dtype == "U8"
    if not fits:
        raise SourceError(
            f"{source.name}: {name} has shape {list(blocks.shape)} and {beside} {scales.dtype} {list(scales.shape)}; fracbit "
            f"decodes U8 [experts, out, in / 32, {BYTES}] with scales U8 [experts, out, in / 32]: fetch the checkpoint again"
        )
    experts, out, groups = scales.shape

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        scaled = (
            fp4_values(parts["blocks"]) * scale_values(parts["scales"])[..., None]
        )  # [some, out, groups, 32]
        return scaled.flatten(2).transpose(1, 2)  # [some, in, out]

    info = TensorInfo(blocks.file, config_type(source.config), (experts, groups * 2 * BYTES, out))
    parts = {"blocks": Part(name, rows=1, kinds=("U8",)), "scales": Part(beside, rows=1)}
    return Decoding(info, parts, values, upright=False, scheme="mxfp4/32")


MXFP4 = SourceFormat(seen, decode)
