"""How blocks of ggml lie in bytes: from a packed weight to rows, and from rows to the packed weight that they are.

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

d is the step, scale * unit, which fp16 holds exactly. Functions that read take the blocks uint8 [out, blocks, bytes].

Ref: ggml-common.h and ggml-quants.c of llama.cpp, build 11434.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.checkpoint.export.coded import steps
from fracbit.checkpoint.export.small_floats import (
    BIAS,
    counted,
    exponents,
    float_codes,
    small_steps,
)
from fracbit.errors import FormatError
from fracbit.numerics.bits import pack_bits, unpack_bits
from fracbit.numerics.datatypes import scale_unit
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor, check_values
from fracbit.records.scheme import Scheme

BLOCK, SUPERBLOCK = 32, 256


@dataclass(frozen=True)
class BlockLayout:
    """Both directions: rows uint8 [out, bytes] of a packed weight, and the packed weight of blocks uint8 [out, blocks, bytes].

    `decode` takes the scheme too, and raises `FormatError` for what no scheme has.
    """

    encode: Callable[[PackedTensor], Tensor]
    decode: Callable[[Tensor, Scheme], PackedTensor]


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows of bytes [out, blocks * n] from the parts of a block, each uint8 [out, blocks, n of its own]."""
    return torch.cat(list(parts), -1).flatten(1)  # [out, blocks * n]


def _parts(blocks: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The parts of blocks [out, blocks, bytes], of so many bytes each."""
    return tuple(torch.split(blocks, list(sizes), -1))


def _half(values: Tensor) -> Tensor:
    """The bytes uint8 [out, blocks, 2] of fp16 values [out, blocks]."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)  # [out, blocks, 2]


def _halves(data: Tensor) -> Tensor:
    """The fp16 values [out, blocks] of their bytes [out, blocks, 2]."""
    return data.contiguous().view(torch.float16).squeeze(-1)  # [out, blocks]


def _made(
    scheme: Scheme,
    codes: Tensor,
    scales: Tensor | PackedTensor,
    offsets: Tensor | PackedTensor | None = None,
) -> PackedTensor:
    """The packed weight of `codes` uint8 [out, in]. Raises `FormatError` for what no scheme has."""
    shape = (codes.shape[0], codes.shape[1])
    packed = PackedTensor(scheme, shape, pack_bits(codes.contiguous(), scheme.bits), scales, offsets=offsets)
    check_values(packed)
    return packed


def _in_units(values: Tensor, unit: float) -> Tensor:
    """Steps in fp16 as scales, which are more by 1 / `unit`. Raises `FormatError` where fp16 ends before."""
    scales = (values.float() / unit).half()
    if not torch.equal((scales.float() * unit).half(), values):
        raise FormatError("its steps do not fit fp16 as scales")
    return scales


# --- blocks of 32 -----------------------------------------------------------------------------------------------------


def _bottoms(packed: PackedTensor) -> tuple[Tensor, ...]:
    """The value of code 0 in every block, where the type stores one."""
    return (_half(packed.offsets),) if isinstance(packed.offsets, Tensor) else ()


def _plain(scheme: Scheme, codes: Tensor, step: Tensor, bottom: Sequence[Tensor]) -> PackedTensor:
    """The packed weight of codes [out, blocks, 32] with the bytes of a step, and of a bottom where there is one."""
    scales = _in_units(_halves(step), scale_unit(scheme))
    return _made(scheme, codes.flatten(1), scales, *(_halves(each) for each in bottom))


def _codes(packed: PackedTensor, length: int = BLOCK) -> Tensor:
    """The codes uint8 [out, blocks, length]."""
    return codes_in(packed).view(packed.shape[0], -1, length)  # [out, blocks, length]


def _nibbles(codes: Tensor) -> Tensor:
    """The low 4 bits of codes [out, blocks, 32]: [out, blocks, 16]."""
    low = codes & 15  # [out, blocks, 32]
    return low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4  # [out, blocks, 16]


def _unnibbled(data: Tensor) -> Tensor:
    """Codes of 4 bits [out, blocks, 32] of their bytes [out, blocks, 16]."""
    return torch.cat([data & 15, data >> 4], -1)  # [out, blocks, 32]


def _fields(scheme: Scheme) -> list[int]:
    """Bytes of a step, and of a bottom where the scheme has one."""
    return [2] if scheme.offset == "none" else [2, 2]


def _bytes(packed: PackedTensor) -> Tensor:
    """Q8_0: codes of 8 bits, 0 to 255, become signed numbers: the top bit turns over."""
    return _rows([_half(steps(packed)), _codes(packed) ^ 128])


def _of_bytes(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q8_0."""
    step, codes = _parts(blocks, [2, BLOCK])
    return _plain(scheme, codes ^ 128, step, ())


def _fours(packed: PackedTensor) -> Tensor:
    """Q4_0, Q4_1, IQ4_NL."""
    return _rows([_half(steps(packed)), *_bottoms(packed), _nibbles(_codes(packed))])


def _of_fours(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q4_0, Q4_1, IQ4_NL."""
    step, *bottom, low = _parts(blocks, [*_fields(scheme), BLOCK // 2])
    return _plain(scheme, _unnibbled(low), step, bottom)


def _fives(packed: PackedTensor) -> Tensor:
    """Q5_0, Q5_1: the top bits of codes lie apart."""
    codes = _codes(packed)  # [out, blocks, 32]
    high = pack_bits((codes >> 4).view(-1, BLOCK), 1).view(*codes.shape[:2], -1)  # [out, blocks, 4]
    return _rows([_half(steps(packed)), *_bottoms(packed), high, _nibbles(codes)])


def _of_fives(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q5_0, Q5_1."""
    step, *bottom, high, low = _parts(blocks, [*_fields(scheme), BLOCK // 8, BLOCK // 2])
    top = unpack_bits(high.flatten(0, 1).contiguous(), 1, BLOCK).view(*high.shape[:2], BLOCK)
    return _plain(scheme, _unnibbled(low) | top << 4, step, bottom)


def _micro(packed: PackedTensor) -> Tensor:
    """MXFP4: an exponent, then codes as in Q4_0."""
    codes = float_codes(packed).view(packed.shape[0], -1, BLOCK)  # [out, blocks, 32]
    return _rows([exponents(packed)[..., None], _nibbles(codes)])


def _of_micro(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """MXFP4. Raises `FormatError` where an exponent has no place."""
    exponent, low = _parts(blocks, [1, BLOCK // 2])
    scales = exponent.squeeze(-1).int() - round(math.log2(scale_unit(scheme)))  # [out, blocks]
    if int(scales.max()) > 2 * BIAS:
        raise FormatError("its steps are too large")
    return _made(scheme, counted(_unnibbled(low), scheme).flatten(1), scales.to(torch.uint8))


def _nvidia(packed: PackedTensor) -> Tensor:
    """NVFP4: the steps of four blocks of 16, then the codes of each, those of its second half above those of its first."""
    codes = float_codes(packed).view(packed.shape[0], -1, 4, 2, 8)  # [out, runs of 64, blocks, halves, 8]
    pairs = codes[..., 0, :] | codes[..., 1, :] << 4  # [out, runs, blocks, 8]
    scales = small_steps(packed)[0].view(torch.uint8).view(*codes.shape[:3])  # [out, runs, blocks]
    return _rows([scales, pairs.flatten(2)])


def _of_nvidia(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """NVFP4, with a factor of 1."""
    assert isinstance(scheme.scale, Scheme)
    step, data = _parts(blocks, [4, 32])
    pairs = data.unflatten(-1, (4, 8))  # [out, runs of 64, blocks, 8]
    codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(1)  # [out, in]
    one = BIAS - round(math.log2(scale_unit(scheme) * scale_unit(scheme.scale)))
    scales = _made(scheme.scale, counted(step.reshape(1, -1), scheme.scale), torch.full((1, 1), one).byte())
    return _made(scheme, counted(codes, scheme), scales)


def factor_of(packed: PackedTensor) -> Tensor:
    """What all steps of a tensor are multiplied by, [1]."""
    return small_steps(packed)[1]


# --- superblocks ------------------------------------------------------------------------------------------------------


def _unit(scheme: Scheme, part: str) -> float:
    """What the numbers of blocks count in, d or m, over the scale of these numbers; bottoms lie below 0."""
    assert isinstance(scheme.scale, Scheme)
    return scale_unit(scheme.scale) * (scale_unit(scheme) if part == "scales" else -1.0)


def _small(packed: PackedTensor, part: str) -> tuple[Tensor, Tensor]:
    """Scales or offsets of blocks: codes uint8 [out, superblocks, blocks], and what they count in, bytes of fp16 [.., 2]."""
    stored = getattr(packed, part)
    assert isinstance(stored, PackedTensor)
    assert isinstance(stored.scheme.block, int)
    assert isinstance(stored.scales, Tensor)
    codes = codes_in(stored).view(packed.shape[0], -1, stored.scheme.block)  # [out, superblocks, blocks]
    step = (stored.scales.float() * _unit(packed.scheme, part)).half()  # [1, out * superblocks]
    return codes, _half(step.view(codes.shape[:2]))


def _of_small(scheme: Scheme, part: str, codes: Tensor, step: Tensor) -> PackedTensor:
    """Scales or offsets of blocks from such codes and bytes."""
    assert isinstance(scheme.scale, Scheme)
    scales = _in_units(_halves(step), _unit(scheme, part)).view(1, -1)  # [1, out * superblocks]
    shape = (1, codes.numel())
    return PackedTensor(scheme.scale, shape, pack_bits(codes.reshape(shape), scheme.scale.bits), scales)


def _pairs(codes: Tensor, width: int, bits: int) -> Tensor:
    """Runs of `width` codes over one another in a byte, `bits` each: [out, superblocks, n] to [.., n * bits / 8]."""
    runs = codes.unflatten(-1, (-1, 8 // bits, width))  # [out, superblocks, runs, in a byte, width]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]  # [in a byte, 1]
    joined: Tensor = (runs << shifts).sum(-2, dtype=torch.uint8)  # [out, superblocks, runs, width]
    return joined.flatten(-2)  # [out, superblocks, n * bits / 8]


def _unpaired(data: Tensor, width: int, bits: int) -> Tensor:
    """Undoes `_pairs`: [out, superblocks, n * bits / 8] to [.., n]."""
    runs = data.unflatten(-1, (-1, 1, width))  # [out, superblocks, runs, 1, width]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]  # [in a byte, 1]
    codes: Tensor = (runs >> shifts) & (2**bits - 1)  # [out, superblocks, runs, in a byte, width]
    return codes.flatten(-3)  # [out, superblocks, n]


def _twos(packed: PackedTensor) -> Tensor:
    """Q2_K: steps and bottoms share bytes, four codes 32 apart share one."""
    (scales, step), (bottoms, bottom) = _small(packed, "scales"), _small(packed, "offsets")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    return _rows([scales | bottoms << 4, _pairs(codes, 32, 2), step, bottom])


def _of_twos(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q2_K."""
    both, codes, step, bottom = _parts(blocks, [16, 64, 2, 2])
    scales = _of_small(scheme, "scales", both & 15, step)
    offsets = _of_small(scheme, "offsets", both >> 4, bottom)
    return _made(scheme, _unpaired(codes, 32, 2).flatten(1), scales, offsets)


def _threes(packed: PackedTensor) -> Tensor:
    """Q3_K: the high bits of codes 32 apart share a byte, then low bits as in Q2_K, then low and high bits of the steps."""
    scales, step = _small(packed, "scales")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    low = _pairs(scales & 15, 8, 4)  # [out, superblocks, 8]
    high = _pairs(scales >> 4, 4, 2)  # [out, superblocks, 4]
    return _rows([_pairs(codes >> 2, 32, 1), _pairs(codes & 3, 32, 2), low, high, step])


def _of_threes(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q3_K."""
    top, codes, low, high, step = _parts(blocks, [32, 64, 8, 4, 2])
    scales = _of_small(scheme, "scales", _unpaired(low, 8, 4) | _unpaired(high, 4, 2) << 4, step)
    return _made(scheme, (_unpaired(codes, 32, 2) | _unpaired(top, 32, 1) << 2).flatten(1), scales)


def _six_bits(scales: Tensor, bottoms: Tensor) -> Tensor:
    """Eight steps and eight bottoms of 6 bits [out, superblocks, 8] in 12 bytes: the top bits of the last four lie apart."""
    first = [
        part[..., :4] | (part[..., 4:] >> 4) << 6 for part in (scales, bottoms)
    ]  # [out, superblocks, 4] each
    last = (scales[..., 4:] & 15) | bottoms[..., 4:] << 4  # [out, superblocks, 4]
    return torch.cat([*first, last], -1)  # [out, superblocks, 12]


def _of_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight steps and eight bottoms [out, superblocks, 8] of their 12 bytes."""
    *first, last = _parts(data, [4, 4, 4])
    scales, bottoms = (
        torch.cat([part & 63, low | (part >> 6) << 4], -1)
        for part, low in zip(first, (last & 15, last >> 4), strict=True)
    )
    return scales, bottoms


def _wide(packed: PackedTensor) -> Tensor:
    """Q4_K and Q5_K: two codes 32 apart share a byte; fifth bits are gathered over all eight blocks."""
    (scales, step), (bottoms, bottom) = _small(packed, "scales"), _small(packed, "offsets")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    high = [_pairs(codes >> 4, 32, 1)] if packed.scheme.bits == 5 else []  # [out, superblocks, 32]
    return _rows([step, bottom, _six_bits(scales, bottoms), *high, _pairs(codes & 15, 32, 4)])


def _of_wide(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q4_K and Q5_K."""
    step, bottom, both, *high, low = _parts(blocks, [2, 2, 12, *([32] if scheme.bits == 5 else []), 128])
    codes = _unpaired(low, 32, 4)  # [out, superblocks, 256]
    for top in high:
        codes = codes | _unpaired(top, 32, 1) << 4
    numbers, bottoms = _of_six_bits(both)
    scales = _of_small(scheme, "scales", numbers, step)
    return _made(scheme, codes.flatten(1), scales, _of_small(scheme, "offsets", bottoms, bottom))


def _sixes(packed: PackedTensor) -> Tensor:
    """Q6_K: low bits of codes 64 apart share a byte, high bits of four codes 32 apart; steps are signed bytes."""
    scales, step = _small(packed, "scales")
    codes = _codes(packed, SUPERBLOCK)  # [out, superblocks, 256]
    return _rows([_pairs(codes & 15, 64, 4), _pairs(codes >> 4, 32, 2), scales ^ 128, step])


def _of_sixes(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """Q6_K."""
    low, high, numbers, step = _parts(blocks, [128, 64, 16, 2])
    codes = _unpaired(low, 64, 4) | _unpaired(high, 32, 2) << 4  # [out, superblocks, 256]
    return _made(scheme, codes.flatten(1), _of_small(scheme, "scales", numbers ^ 128, step))


def _extra_small(packed: PackedTensor) -> Tensor:
    """IQ4_XS: the high bits of the steps before the low ones; codes as in IQ4_NL."""
    scales, step = _small(packed, "scales")
    high = pack_bits((scales >> 4).flatten(0, 1), 2).view(*scales.shape[:2], 2)  # [out, superblocks, 2]
    low = pack_bits((scales & 15).flatten(0, 1), 4).view(*scales.shape[:2], 4)  # [out, superblocks, 4]
    codes = _nibbles(_codes(packed)).view(*scales.shape[:2], 128)  # [out, superblocks, 128]
    return _rows([step, high, low, codes])


def _of_extra_small(blocks: Tensor, scheme: Scheme) -> PackedTensor:
    """IQ4_XS."""
    step, high, low, data = _parts(blocks, [2, 2, 4, 128])
    numbers = [
        unpack_bits(part.flatten(0, 1).contiguous(), bits, 8).view(*part.shape[:2], 8)
        for part, bits in ((low, 4), (high, 2))
    ]  # [out, superblocks, 8] each
    codes = _unnibbled(data.unflatten(-1, (8, BLOCK // 2))).flatten(1)  # [out, in]
    return _made(scheme, codes, _of_small(scheme, "scales", numbers[0] | numbers[1] << 4, step))


BYTES = BlockLayout(_bytes, _of_bytes)
FOURS = BlockLayout(_fours, _of_fours)
FIVES = BlockLayout(_fives, _of_fives)
MICRO = BlockLayout(_micro, _of_micro)
NVIDIA = BlockLayout(_nvidia, _of_nvidia)
TWOS = BlockLayout(_twos, _of_twos)
THREES = BlockLayout(_threes, _of_threes)
WIDE = BlockLayout(_wide, _of_wide)
SIXES = BlockLayout(_sixes, _of_sixes)
EXTRA_SMALL = BlockLayout(_extra_small, _of_extra_small)
