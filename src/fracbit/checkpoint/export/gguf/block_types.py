"""llama.cpp's types of blocks: which scheme each one holds as it is, and how its codes lie in a row. A new type is one line.

    Q8_0  d fp16, 32 codes of 8 bits                        w = d q             q -128 to 127
    Q4_0  d fp16, 16 bytes                                  w = d (q - 8)
    Q4_1  d fp16, m fp16, 16 bytes                          w = d q + m
    Q5_0  d fp16, 32 high bits, 16 bytes                    w = d (q - 16)
    Q5_1  d fp16, m fp16, 32 high bits, 16 bytes            w = d q + m

A block is 32 weights along the input. A byte has the low 4 bits of code j and, above them, those of code j + 16. High bits are
the fifth bit of every code, the first code in the lowest bit. d is the step, scale * unit, which fp16 holds exactly.

Ref: ggml-common.h and ggml-quants.c of llama.cpp, build 11434.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.checkpoint.export.coded import STEP, IntegerForms, steps
from fracbit.checkpoint.export.exporter import Nearest
from fracbit.checkpoint.format import StoredLayer
from fracbit.numerics.bits import pack_bits
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A type of blocks, and the `scheme` that it holds without rounding.

    `length`: weights of a block, `bytes`: what it takes. `file_type`: llama.cpp's number of a file that has mostly this type.
    `encode`: the rows uint8 [out, in / length * bytes] of a packed weight.
    """

    scheme: Scheme
    length: int
    bytes: int
    file_type: int
    encode: Callable[[PackedTensor], Tensor]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return width // self.length * self.bytes


def _rows(*parts: Tensor) -> Tensor:
    """Rows of bytes [out, blocks * n] from the parts of a block, each uint8 [out, blocks, n of its own]."""
    return torch.cat(parts, -1).flatten(1)  # [out, blocks * n]


def _half(values: Tensor) -> Tensor:
    """The bytes uint8 [out, blocks, 2] of fp16 values [out, blocks]."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)  # [out, blocks, 2]


def _bottoms(packed: PackedTensor) -> tuple[Tensor, ...]:
    """The value of code 0 in every block, where the type stores one."""
    return (_half(packed.offsets),) if isinstance(packed.offsets, Tensor) else ()


def _codes(packed: PackedTensor) -> Tensor:
    """The codes uint8 [out, blocks, 32]."""
    return codes_in(packed).view(packed.shape[0], -1, BLOCK)  # [out, blocks, 32]


def _nibbles(codes: Tensor) -> Tensor:
    """The low 4 bits of codes [out, blocks, 32]: [out, blocks, 16]."""
    low = codes & 15  # [out, blocks, 32]
    return low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4  # [out, blocks, 16]


def _bytes(packed: PackedTensor) -> Tensor:
    """Codes of 8 bits, 0 to 255, become signed numbers: the top bit turns over."""
    return _rows(_half(steps(packed)), _codes(packed) ^ 128)


def _fours(packed: PackedTensor) -> Tensor:
    """Codes of 4 bits."""
    return _rows(_half(steps(packed)), *_bottoms(packed), _nibbles(_codes(packed)))


def _fives(packed: PackedTensor) -> Tensor:
    """Codes of 5 bits, the top ones apart."""
    codes = _codes(packed)  # [out, blocks, 32]
    high = pack_bits((codes >> 4).view(-1, BLOCK), 1).view(*codes.shape[:2], -1)  # [out, blocks, 4]
    return _rows(_half(steps(packed)), *_bottoms(packed), high, _nibbles(codes))


TYPES: Mapping[str, BlockType] = {
    "Q8_0": BlockType(Scheme(STEP, 8, BLOCK), BLOCK, 34, file_type=7, encode=_bytes),
    "Q4_0": BlockType(Scheme(STEP, 4, BLOCK), BLOCK, 18, file_type=2, encode=_fours),
    "Q4_1": BlockType(Scheme(STEP, 4, BLOCK, offset="float"), BLOCK, 20, file_type=3, encode=_fours),
    "Q5_0": BlockType(Scheme(STEP, 5, BLOCK), BLOCK, 22, file_type=8, encode=_fives),
    "Q5_1": BlockType(Scheme(STEP, 5, BLOCK, offset="float"), BLOCK, 24, file_type=9, encode=_fives),
}
"""Every type, by ggml's name. One that looks at more than 32 weights at once has a `length` of its own."""


def type_of(layer: StoredLayer) -> str | None:
    """The type that holds a layer as it is; None where there is none."""
    fits = [
        name
        for name, kind in TYPES.items()
        if layer.scheme == kind.scheme and layer.shape[1] % kind.length == 0 and not layer.outliers
    ]
    return fits[0] if fits else None


@dataclass(frozen=True)
class BlockForms:
    """The forms of layers that a file holds: blocks of 32 with 4, 5 or 8 bits, embedding tables too."""

    few: IntegerForms
    many: IntegerForms
    embeddings: bool = True

    def nearest(self, layer: StoredLayer) -> Nearest:
        """A layer's own form, or integers of at least as many bits with blocks of 32."""
        if type_of(layer) is not None and not layer.rotated and layer.inputs is None:
            return Nearest(layer.scheme)
        return (self.few if layer.scheme.bits <= max(self.few.bits) else self.many).nearest(layer)

    def with_scales(self, kind: str) -> BlockForms:
        """The same: every type has scales of fp16."""
        return self


FEW = IntegerForms(bits=(4, 5), offsets=("none", "float"), blocks=(BLOCK,), scales=("fp16",), embeddings=True)
GGUF_FORMS = BlockForms(FEW, replace(FEW, bits=(8,), offsets=("none",)))
