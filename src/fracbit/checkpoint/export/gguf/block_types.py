"""llama.cpp's types of blocks: which scheme each one holds as it is, and how its codes lie in a row. A new type is one line.

Blocks of 32 weights, with a step d in fp16 and, where there is an offset, a bottom m in fp16:

    Q8_0  32 codes of 8 bits                    w = d q             q -128 to 127
    Q4_0  16 bytes                              w = d (q - 8)
    Q4_1  16 bytes                              w = d q + m
    Q5_0  32 high bits, 16 bytes                w = d (q - 16)
    Q5_1  32 high bits, 16 bytes                w = d q + m
    IQ4_NL  16 bytes                            w = d T[q]          T a fixed table
    MXFP4  a byte e, 16 bytes                   w = 2^(e - 127) T[q]    T the numbers of E2M1
    NVFP4  4 bytes s, 32 bytes, of 64 weights   w = f s T[q]       s in E4M3 for 16 weights; f in a tensor of its own

Superblocks of 256 weights, whose blocks have steps and bottoms of few bits, s and b, in units of d and -m:

    Q2_K  16 blocks, s and b of 4 bits          w = d s q - m b
    Q3_K  16 blocks, s of 6 bits, -32 to 31     w = d s (q - 4)
    Q4_K  8 blocks, s and b of 6 bits           w = d s q - m b
    Q5_K  8 blocks, s and b of 6 bits           w = d s q - m b
    Q6_K  16 blocks, s of 8 bits, signed        w = d s (q - 32)
    IQ4_XS  8 blocks, s of 6 bits, -32 to 31    w = d s T[q]

d is the step, scale * unit, which fp16 holds exactly.

Ref: ggml-common.h and ggml-quants.c of llama.cpp, build 11434.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.checkpoint.export.coded import reasons, steps, unexportable
from fracbit.checkpoint.export.exporter import Nearest
from fracbit.checkpoint.export.small_floats import MXFP4, NVFP4, exponents, float_codes, small_steps
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.integers import STEP
from fracbit.numerics.bits import pack_bits
from fracbit.numerics.datatypes import scale_unit
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme

BLOCK, SUPERBLOCK = 32, 256


@dataclass(frozen=True)
class BlockType:
    """A type of blocks, and the `scheme` that it holds without rounding.

    `length`: weights of a block, `bytes`: what it takes. `file_type`: llama.cpp's number of a file that has mostly this type.
    `encode`: the rows uint8 [out, in / length * bytes] of a packed weight. `factor`: fp32 [1], which llama.cpp keeps in
    a tensor beside it, called `scale`.
    """

    scheme: Scheme
    length: int
    bytes: int
    file_type: int
    encode: Callable[[PackedTensor], Tensor]
    factor: Callable[[PackedTensor], Tensor] | None = None

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return width // self.length * self.bytes


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows of bytes [out, blocks * n] from the parts of a block, each uint8 [out, blocks, n of its own]."""
    return torch.cat(list(parts), -1).flatten(1)  # [out, blocks * n]


def _half(values: Tensor) -> Tensor:
    """The bytes uint8 [out, blocks, 2] of fp16 values [out, blocks]."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)  # [out, blocks, 2]


def _bottoms(packed: PackedTensor) -> tuple[Tensor, ...]:
    """The value of code 0 in every block, where the type stores one."""
    return (_half(packed.offsets),) if isinstance(packed.offsets, Tensor) else ()


def _codes(packed: PackedTensor, length: int = BLOCK) -> Tensor:
    """The codes uint8 [out, blocks, length]."""
    return codes_in(packed).view(packed.shape[0], -1, length)  # [out, blocks, length]


def _nibbles(codes: Tensor) -> Tensor:
    """The low 4 bits of codes [out, blocks, 32]: [out, blocks, 16]."""
    low = codes & 15  # [out, blocks, 32]
    return low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4  # [out, blocks, 16]


def _bytes(packed: PackedTensor) -> Tensor:
    """Codes of 8 bits, 0 to 255, become signed numbers: the top bit turns over."""
    return _rows([_half(steps(packed)), _codes(packed) ^ 128])


def _fours(packed: PackedTensor) -> Tensor:
    """Codes of 4 bits."""
    return _rows([_half(steps(packed)), *_bottoms(packed), _nibbles(_codes(packed))])


def _fives(packed: PackedTensor) -> Tensor:
    """Codes of 5 bits, the top ones apart."""
    codes = _codes(packed)  # [out, blocks, 32]
    high = pack_bits((codes >> 4).view(-1, BLOCK), 1).view(*codes.shape[:2], -1)  # [out, blocks, 4]
    return _rows([_half(steps(packed)), *_bottoms(packed), high, _nibbles(codes)])


# --- superblocks ------------------------------------------------------------------------------------------------------


def _small(packed: PackedTensor, part: str) -> tuple[Tensor, Tensor]:
    """Scales or offsets of blocks: codes uint8 [out, superblocks, blocks], and what they count in, bytes of fp16 [.., 2]."""
    stored = getattr(packed, part)
    assert isinstance(stored, PackedTensor)
    assert isinstance(stored.scheme.block, int)
    assert isinstance(stored.scales, Tensor)
    codes = codes_in(stored).view(packed.shape[0], -1, stored.scheme.block)  # [out, superblocks, blocks]
    unit = scale_unit(stored.scheme) * (scale_unit(packed.scheme) if part == "scales" else -1.0)
    step = (stored.scales.float() * unit).half()  # [1, out * superblocks]
    return codes, _half(step.view(codes.shape[:2]))


def _pairs(codes: Tensor, width: int, bits: int) -> Tensor:
    """Runs of `width` codes over one another in a byte, `bits` each: [out, superblocks, n] to [.., n * bits / 8]."""
    runs = codes.unflatten(-1, (-1, 8 // bits, width))  # [out, superblocks, runs, in a byte, width]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]  # [in a byte, 1]
    joined: Tensor = (runs << shifts).sum(-2, dtype=torch.uint8)  # [out, superblocks, runs, width]
    return joined.flatten(-2)  # [out, superblocks, n * bits / 8]


def _twos(packed: PackedTensor) -> Tensor:
    """Q2_K: steps and bottoms share bytes, four codes 32 apart share one."""
    (scales, step), (bottoms, bottom) = _small(packed, "scales"), _small(packed, "offsets")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    return _rows([scales | bottoms << 4, _pairs(codes, 32, 2), step, bottom])


def _threes(packed: PackedTensor) -> Tensor:
    """Q3_K: the high bits of codes 32 apart share a byte, then low bits as in Q2_K, then low and high bits of the steps."""
    scales, step = _small(packed, "scales")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    low = _pairs(scales & 15, 8, 4)  # [out, superblocks, 8]
    high = _pairs(scales >> 4, 4, 2)  # [out, superblocks, 4]
    return _rows([_pairs(codes >> 2, 32, 1), _pairs(codes & 3, 32, 2), low, high, step])


def _six_bits(scales: Tensor, bottoms: Tensor) -> Tensor:
    """Eight steps and eight bottoms of 6 bits [out, superblocks, 8] in 12 bytes: the top bits of the last four lie apart."""
    first = [
        part[..., :4] | (part[..., 4:] >> 4) << 6 for part in (scales, bottoms)
    ]  # [out, superblocks, 4] each
    last = (scales[..., 4:] & 15) | bottoms[..., 4:] << 4  # [out, superblocks, 4]
    return torch.cat([*first, last], -1)  # [out, superblocks, 12]


def _wide(packed: PackedTensor) -> Tensor:
    """Q4_K and Q5_K: two codes 32 apart share a byte; fifth bits are gathered over all eight blocks."""
    (scales, step), (bottoms, bottom) = _small(packed, "scales"), _small(packed, "offsets")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    high = [_pairs(codes >> 4, 32, 1)] if packed.scheme.bits == 5 else []  # [out, superblocks, 32]
    return _rows([step, bottom, _six_bits(scales, bottoms), *high, _pairs(codes & 15, 32, 4)])


def _sixes(packed: PackedTensor) -> Tensor:
    """Q6_K: low bits of codes 64 apart share a byte, high bits of four codes 32 apart; steps are signed bytes."""
    scales, step = _small(packed, "scales")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    return _rows([_pairs(codes & 15, 64, 4), _pairs(codes >> 4, 32, 2), scales ^ 128, step])


def _extra_small(packed: PackedTensor) -> Tensor:
    """IQ4_XS: the high bits of the steps before the low ones; codes as in IQ4_NL."""
    scales, step = _small(packed, "scales")
    high = pack_bits((scales >> 4).flatten(0, 1), 2).view(*scales.shape[:2], 2)  # [out, superblocks, 2]
    low = pack_bits((scales & 15).flatten(0, 1), 4).view(*scales.shape[:2], 4)  # [out, superblocks, 4]
    codes = _nibbles(_codes(packed)).view(*scales.shape[:2], 128)  # [out, superblocks, 128]
    return _rows([step, high, low, codes])


def _micro(packed: PackedTensor) -> Tensor:
    """MXFP4: an exponent, then codes as in Q4_0."""
    codes = float_codes(packed).view(packed.shape[0], -1, BLOCK)  # [out, blocks, 32]
    return _rows([exponents(packed)[..., None], _nibbles(codes)])


def _nvidia(packed: PackedTensor) -> Tensor:
    """NVFP4: the steps of four blocks of 16, then the codes of each, those of its second half above those of its first."""
    codes = float_codes(packed).view(packed.shape[0], -1, 4, 2, 8)  # [out, runs of 64, blocks, halves, 8]
    pairs = codes[..., 0, :] | codes[..., 1, :] << 4  # [out, runs, blocks, 8]
    scales = small_steps(packed)[0].view(torch.uint8).view(*codes.shape[:3])  # [out, runs, blocks]
    return _rows([scales, pairs.flatten(2)])


def _factor(packed: PackedTensor) -> Tensor:
    """What all steps of a tensor are multiplied by, [1]."""
    return small_steps(packed)[1]


def _block(dtype: str, bits: int, offset: bool = False) -> Scheme:
    """The scheme of a type with blocks of 32."""
    return Scheme(dtype, bits, BLOCK, offset="float" if offset else "none")


def _super(dtype: str, bits: int, block: int, scale: str) -> Scheme:
    """The scheme of a type with superblocks: an offset goes with steps that count from 0."""
    return Scheme(dtype, bits, block, offset="float" if scale.startswith("int:up") else "none", scale=scale)


TYPES: Mapping[str, BlockType] = {
    "Q8_0": BlockType(_block(STEP, 8), BLOCK, 34, file_type=7, encode=_bytes),
    "Q4_0": BlockType(_block(STEP, 4), BLOCK, 18, file_type=2, encode=_fours),
    "Q4_1": BlockType(_block(STEP, 4, True), BLOCK, 20, file_type=3, encode=_fours),
    "Q5_0": BlockType(_block(STEP, 5), BLOCK, 22, file_type=8, encode=_fives),
    "Q5_1": BlockType(_block(STEP, 5, True), BLOCK, 24, file_type=9, encode=_fives),
    "IQ4_NL": BlockType(_block("iq", 4), BLOCK, 18, file_type=25, encode=_fours),
    "MXFP4": BlockType(MXFP4, BLOCK, 17, file_type=38, encode=_micro),
    "NVFP4": BlockType(NVFP4, 64, 36, file_type=39, encode=_nvidia, factor=_factor),
    "Q2_K": BlockType(_super(STEP, 2, 16, "int:up4:16"), SUPERBLOCK, 84, file_type=10, encode=_twos),
    "Q3_K": BlockType(_super(STEP, 3, 16, "int:step6:16"), SUPERBLOCK, 110, file_type=12, encode=_threes),
    "Q4_K": BlockType(_super(STEP, 4, 32, "int:up6:8"), SUPERBLOCK, 144, file_type=15, encode=_wide),
    "Q5_K": BlockType(_super(STEP, 5, 32, "int:up6:8"), SUPERBLOCK, 176, file_type=17, encode=_wide),
    "Q6_K": BlockType(_super(STEP, 6, 16, "int:step8:16"), SUPERBLOCK, 210, file_type=18, encode=_sixes),
    "IQ4_XS": BlockType(
        _super("iq", 4, 32, "int:step6:8"), SUPERBLOCK, 136, file_type=30, encode=_extra_small
    ),
}
"""Every type, by ggml's name."""


def type_of(layer: StoredLayer) -> str | None:
    """The type that holds a layer as it is; None where there is none."""
    fits = [
        name
        for name, kind in TYPES.items()
        if layer.scheme == kind.scheme
        and layer.shape[1] % kind.length == 0
        and not layer.outliers
        and (kind.factor is None or layer.kind != "embedding")
    ]
    return fits[0] if fits else None


@dataclass(frozen=True)
class BlockForms:
    """The forms of layers that a file holds: all `TYPES`, each where its length divides the inputs."""

    embeddings: bool = True

    @property
    def levels(self) -> tuple[Scheme, ...]:
        """Every scheme that some layer may have."""
        return tuple(kind.scheme for kind in TYPES.values())

    def nearest(self, layer: StoredLayer) -> Nearest:
        """A layer's own form, or the type that is nearest in bits, then in offset, data type and size, with as many bits."""
        refused = unexportable(layer)
        if refused is not None:
            return refused
        fits = [kind for kind in TYPES.values() if layer.shape[1] % kind.length == 0]
        if layer.kind == "embedding":
            fits = [kind for kind in fits if kind.factor is None]  # rows of a table are looked up without it
        if not fits:
            return Nearest("float", f"no block of the format divides its {layer.shape[1]} inputs")
        asked = layer.scheme

        def distance(kind: BlockType) -> tuple[bool, int, bool, bool, float]:
            new = kind.scheme
            bare = (new.offset == "none") != (asked.offset == "none")
            other = new.dtype != (asked.dtype if asked.dtype in ("iq", "ocp") else STEP)
            return new.bits < asked.bits, abs(new.bits - asked.bits), bare, other, kind.bytes / kind.length

        own = [kind.scheme for kind in fits if kind.scheme == asked]
        new = own[0] if own else min(fits, key=distance).scheme
        return Nearest(new, ", ".join(reasons(layer, new)))

    def with_scales(self, kind: str) -> BlockForms:
        """The same: every type has scales of fp16."""
        return self


GGUF_FORMS = BlockForms()
