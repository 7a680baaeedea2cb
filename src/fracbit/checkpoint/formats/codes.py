"""What the formats share: codes in words and bytes, grids of scales over a matrix, the types of what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fracbit.numerics.bits import row_bytes, unpack_bits
from fracbit.records.scheme import Offset, Scheme

if TYPE_CHECKING:
    from fracbit.checkpoint.source import Source, TensorInfo

SIXTEEN = ("F16", "BF16")
SCALE_TYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""Floats of 16 and 32 bits, the least precise first: what schemes call the types of headers."""
CONFIG_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1, by their code: sign, two bits of exponent, one of mantissa."""
Patch = tuple[int, int]
"""Rows and columns that share a scale."""


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes uint8 [rows, count] of words int32 [rows, n]: one stream of bits in each row, the least significant first."""
    stream = (
        words.reshape(-1).view(torch.uint8).view(len(words), -1)
    )  # [rows, 4 n], little-endian as safetensors are
    return unpack_bits(stream[:, : row_bytes(count, bits)], bits, count)  # [rows, count]


def words_for(count: int, bits: int) -> int:
    """How many words of 32 bits hold `count` codes in one stream."""
    return -(-count * bits // 32)


def fp4_values(packed: Tensor) -> Tensor:
    """fp32 [..., 2 n] of bytes [..., n] that hold two E2M1 codes each, the first one in the low half."""
    pairs = torch.stack([packed & 15, packed >> 4], -1)  # [..., n, 2]
    return torch.tensor(FP4)[pairs.long()].flatten(-2)  # [..., 2 n]


def block_of(shape: Sequence[int], grid: Sequence[int], asked: Patch | None, usual: Patch) -> Patch | None:
    """Rows and columns of a matrix [..., out, in] that share a scale of `grid`; None where the shapes do not fit.

    A grid is one number, one for each row or matrix, or one for each block of `asked` rows and columns, else `usual`.
    """
    *matrices, out, width = shape
    if math.prod(grid) == 1 and (asked is None or len(grid) < 2):
        return out, width
    if matrices and math.prod(grid) == math.prod(matrices) == grid[0]:
        return out, width
    if list(grid) in ([*matrices, out, 1], [*matrices, out]):
        return 1, width
    block = asked or usual
    blocks = [*matrices, -(-out // block[0]), -(-width // block[1])]
    return block if list(grid) == blocks else None


def spread(scale: Tensor, shape: Sequence[int], block: Patch) -> Tensor:
    """A grid of scales in a shape that multiplies a tensor of `shape` [..., out, in], which begins at a whole block."""
    missing = len(shape) - scale.dim()
    scale = scale.reshape(*scale.shape, *[1] * missing)  # one for each row or matrix, or for all
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if scale.shape[axis] > 1 and size > 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


def decoded_type(source: Source, scale: TensorInfo) -> str:
    """The type of decoded weights: that of their scales if it has 16 bits, else the config's, else BF16."""
    return scale.dtype if scale.dtype in SIXTEEN else config_type(source.config)


def spelled(bits: int, group: int, width: int, *, offset: Offset, scale: TensorInfo) -> str:
    """Integers in groups along the inputs as a scheme of fracbit; one group is a whole row."""
    kind = SCALE_TYPES.get(scale.dtype, "fp32")
    return str(Scheme("int:step", bits, "row" if group == width else group, offset=offset, scale=kind))


def config_type(config: Mapping[str, Any]) -> str:
    """The type that a config names for its model, at its top or in the config of its text model; else BF16."""
    for place in (config, config.get("text_config") or {}):
        named = str(place.get("dtype") or place.get("torch_dtype") or "").removeprefix("torch.")
        if named in CONFIG_TYPES:
            return CONFIG_TYPES[named]
    return "BF16"
