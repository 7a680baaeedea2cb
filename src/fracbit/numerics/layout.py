"""Blocks: the weights that share a scale, for every block size and axis, as one view `[lines, blocks, block]`.

A line is what is cut into blocks: a row for axis "in", a column for axis "out", the whole row-major tensor for "tensor" and
"flat:N". The last block of a line may be short; it is padded with its own last value, which changes no maximum.
"""

import torch
from torch import Tensor

from fracbit.records.scheme import Scheme, flat_block


def lines_of(weight: Tensor, scheme: Scheme) -> Tensor:
    """`weight` [out, in] as [lines, length]; a view where strides allow."""
    if scheme.block == "tensor" or flat_block(scheme.block):
        return weight.reshape(1, -1)
    return weight if scheme.axis == "in" else weight.T


def block_length(shape: tuple[int, int], scheme: Scheme) -> int:
    """Weights in a full block of a tensor of `shape`; never more than the line holds."""
    line = line_length(shape, scheme)
    if isinstance(scheme.block, int):
        return min(scheme.block, line)
    return min(flat_block(scheme.block) or line, line)


def line_length(shape: tuple[int, int], scheme: Scheme) -> int:
    """Weights in a line of a tensor of `shape`."""
    if scheme.block == "tensor" or flat_block(scheme.block):
        return shape[0] * shape[1]
    return shape[1] if scheme.axis == "in" else shape[0]


def scales_shape(shape: tuple[int, int], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the scales as they are stored: [out, blocks], [blocks, in] for axis "out", [blocks] for "flat:N"."""
    blocks = -(-line_length(shape, scheme) // block_length(shape, scheme))
    if flat_block(scheme.block):
        return (blocks,)
    if scheme.block == "tensor":
        return (1, 1)
    return (shape[0], blocks) if scheme.axis == "in" else (blocks, shape[1])


def to_blocks(lines: Tensor, block: int) -> Tensor:
    """`lines` [lines, length] as [lines, blocks, block]; a short last block repeats its last value."""
    short = -lines.shape[1] % block
    if short:
        lines = torch.cat([lines, lines[:, -1:].expand(-1, short)], 1)
    return lines.reshape(len(lines), -1, block)


def stored_order(per_block: Tensor, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """Values per block [lines, blocks] in the order and shape in which they are stored."""
    stored = scales_shape(shape, scheme)
    if scheme.axis == "out" and scheme.block != "tensor" and len(stored) == 2:
        per_block = per_block.T
    return per_block.reshape(stored).contiguous()


def spread(
    stored: Tensor, shape: tuple[int, int], scheme: Scheme, first: int = 0, last: int | None = None
) -> Tensor:
    """Values per block, as stored, repeated over the weights of their block: rows `first` to `last` of [out, in].

    Broadcastable rather than full where all weights of a row, of a column or of the tensor share a value.
    """
    last = shape[0] if last is None else last
    block = block_length(shape, scheme)
    if scheme.block == "tensor":
        return stored
    if flat_block(scheme.block):
        begin, end = first * shape[1], last * shape[1]
        covering = stored[begin // block : -(-end // block)].repeat_interleave(block)
        return covering[begin % block :][: end - begin].view(-1, shape[1])
    if scheme.axis == "out":
        return stored[torch.arange(first, last, device=stored.device) // block]
    if stored.shape[1] == 1:
        return stored[first:last]
    return _stretch(stored[first:last], block)[:, : shape[1]]


def _stretch(values: Tensor, block: int) -> Tensor:
    """Each value [rows, blocks] repeated `block` times; several times faster than repeat_interleave."""
    return values.unsqueeze(-1).expand(-1, -1, block).reshape(len(values), -1)


def spread_rows(stored: Tensor, shape: tuple[int, int], scheme: Scheme, rows: Tensor) -> Tensor:
    """As `spread`, for the rows listed in `rows` [n] in any order: [n, in] or broadcastable to it."""
    if scheme.block == "tensor":
        return stored
    block = block_length(shape, scheme)
    if flat_block(scheme.block):
        position = rows[:, None] * shape[1] + torch.arange(shape[1], device=rows.device)
        return stored[position // block]
    if scheme.axis == "out":
        return stored[rows // block]
    return _stretch(stored[rows], block)[:, : shape[1]]


def block_sums(x: Tensor, scheme: Scheme) -> Tensor:
    """Sums of `x` [out, in] over each block, in the shape in which scales are stored."""
    shape = (x.shape[0], x.shape[1])
    block = block_length(shape, scheme)
    lines = lines_of(x, scheme)
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[1] % block))
    return stored_order(lines.reshape(len(lines), -1, block).sum(-1), shape, scheme)


def row_chunks(shape: tuple[int, int], scheme: Scheme, weights: int = 1 << 21) -> list[tuple[int, int]]:
    """Cut the rows into runs of about `weights` weights that no block crosses; one run where blocks cross rows."""
    if scheme.block == "tensor" or flat_block(scheme.block):
        return [(0, shape[0])]
    align = block_length(shape, scheme) if scheme.axis == "out" else 1
    rows = max(1, weights // max(1, shape[1] * align)) * align
    return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]
