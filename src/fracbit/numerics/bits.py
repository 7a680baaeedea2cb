"""Dense bit packing: k-bit codes as a little-endian bit stream, every row padded to a whole byte. 3 bits cost 3 bits.

Element i of a row occupies bits i*k .. i*k + k - 1 of the row, least significant bit first. Eight codes fill k bytes exactly,
so packing works on groups of eight held in one 64-bit word.
"""

import torch
from torch import Tensor

from fracbit.errors import FormatError


def row_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` uint8 [rows, n], each below 2^bits, into uint8 [rows, ceil(n * bits / 8)]."""
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    groups = -(-n // 8)
    codes = torch.nn.functional.pad(codes, (0, -n % 8)).view(rows, groups, 8)  # [rows, groups, 8]
    if bits in (1, 2, 4):
        return _pack_within_bytes(codes, bits)[:, : row_bytes(n, bits)].contiguous()
    word = codes[..., 0].to(torch.int64)  # [rows, groups]
    for i in range(1, 8):
        word = word | (codes[..., i].to(torch.int64) << (i * bits))  # [rows, groups]
    packed = torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], -1)  # [rows, groups, bits]
    packed = packed.to(torch.uint8).view(rows, groups * bits)  # [rows, groups * bits]
    return packed[:, : row_bytes(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [rows, count]. Raises `FormatError` when the row length does not fit."""
    rows, width = packed.shape
    if width != row_bytes(count, bits):
        raise FormatError(
            f"{count} codes of {bits} bits take {row_bytes(count, bits)} bytes a row, got {width}"
        )
    if bits == 8:
        return packed
    if bits in (1, 2, 4):
        return _unpack_within_bytes(_groups(packed, bits, count), bits)[:, :count]
    words, mask = _words(packed, bits, count), (1 << bits) - 1  # [rows, groups]
    codes = torch.stack([(words >> (i * bits)) & mask for i in range(8)], -1)  # [rows, groups, 8]
    return codes.to(torch.uint8).view(rows, 8 * words.shape[1])[:, :count]


def _groups(packed: Tensor, bits: int, count: int) -> Tensor:
    """`packed` [rows, bytes], padded to whole groups of eight codes: [rows, groups, bits]."""
    groups = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[1]))  # [rows, groups * bits]
    return padded.view(len(packed), groups, bits)  # [rows, groups, bits]


def _words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Eight codes in one int64 each: [rows, groups]."""
    grouped = _groups(packed, bits, count)  # [rows, groups, bits]
    words = grouped[..., 0].to(torch.int64)  # [rows, groups]
    for j in range(1, bits):
        words = words | (grouped[..., j].to(torch.int64) << (8 * j))  # [rows, groups]
    return words


def has_top_code(packed: Tensor, bits: int, count: int) -> bool:
    """Whether one of `count` codes a row of `packed` uint8 [rows, bytes] is 2^bits - 1, all of its bits set.

    Padding counts as code 0. No code is unpacked: all codes of a byte, or of a word of eight codes, are asked at once.
    """
    if bits in (1, 2, 4, 8):
        words, spots = packed, range(0, 8, bits)  # [rows, bytes]
    else:
        words, spots = _words(packed, bits, count), range(0, 8 * bits, bits)  # [rows, groups]
    ones = words
    for shift in range(1, bits):
        ones = ones & (words >> shift)  # the lowest bit of a code: whether all of its bits are set
    return bool((ones & sum(1 << spot for spot in spots)).any())


def _pack_within_bytes(codes: Tensor, bits: int) -> Tensor:
    """`codes` [rows, groups, 8] as [rows, bytes]: no code of 1, 2 or 4 bits crosses a byte, so bytes are shifted."""
    slots = codes.view(len(codes), codes.shape[1] * bits, 8 // bits)  # [rows, bytes, slots]
    packed = slots[..., 0].clone()  # [rows, bytes]
    for i in range(1, 8 // bits):
        packed |= slots[..., i] << (i * bits)
    return packed


def _unpack_within_bytes(packed: Tensor, bits: int) -> Tensor:
    """`packed` [rows, groups, bits] as codes [rows, groups * 8]."""
    mask = (1 << bits) - 1
    slots = [(packed >> (i * bits)) & mask for i in range(8 // bits)]  # each [rows, groups, bits]
    codes = torch.stack(slots, -1)  # [rows, groups, bits, slots]
    return codes.view(len(packed), packed.shape[1] * packed.shape[2] * (8 // bits))
