"""Where blocks lie: the weights that share a scale, for every block size and axis, as one view `[lines, blocks, block]`.

A line is what is cut into blocks: a row for axis "in", a column for axis "out", the whole row-major tensor for "tensor" and
"flat:N", a band of rows, patch after patch, for "128x128". The last block of a line may be short; it is padded with its own
last value, which changes no maximum.
"""

import torch
from torch import Tensor

from fracbit.records.scheme import Scheme, flat_block, patch_block


def patch_size(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int] | None:
    """Rows and columns of a full patch of a tensor of `shape`; None for blocks that are no patches."""
    asked = patch_block(scheme.block)
    return None if asked is None else (min(asked[0], shape[0]), min(asked[1], shape[1]))


def lines_of(weight: Tensor, scheme: Scheme, *, zeros: bool = False) -> Tensor:
    """`weight` [out, in] as [lines, length]; a view where strides allow.

    Patches are whole: those at the edges are filled up with their own last values, or with `zeros`.
    """
    size = patch_size((weight.shape[0], weight.shape[1]), scheme)
    if size is not None:
        return _bands(weight, size, zeros)
    if scheme.block == "tensor" or flat_block(scheme.block):
        return weight.reshape(1, -1)  # [1, out * in]
    return weight if scheme.axis == "in" else weight.T  # [out, in] or [in, out]


def _bands(weight: Tensor, size: tuple[int, int], zeros: bool) -> Tensor:
    """Patches of `weight` [out, in] one after another, [bands, patches of a band * rows * columns]."""
    (out, width), (rows, columns) = weight.shape, size
    short = (0, -width % columns, 0, -out % rows)
    if any(short) and zeros:
        weight = torch.nn.functional.pad(weight, short)
    elif any(short):
        places = [
            torch.arange(size + more, device=weight.device).clamp(max=size - 1)
            for size, more in ((out, short[3]), (width, short[1]))
        ]
        weight = weight[places[0]][:, places[1]]
    whole = weight.reshape(weight.shape[0] // rows, rows, -1, columns)  # [bands, rows, patches, columns]
    return whole.transpose(1, 2).flatten(1)  # [bands, patches * rows * columns]


def from_patches(blocks: Tensor, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """The weight [out, in] of its patches [patches, rows * columns]; undoes `lines_of`, whatever fills the edges."""
    size = patch_size(shape, scheme)
    assert size is not None
    bands = blocks.view(-(-shape[0] // size[0]), -1, *size).transpose(1, 2)  # [bands, rows, patches, columns]
    return bands.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]  # [out, in]


def block_length(shape: tuple[int, int], scheme: Scheme) -> int:
    """Weights in a full block of a tensor of `shape`; never more than the line holds."""
    if (size := patch_size(shape, scheme)) is not None:
        return size[0] * size[1]
    line = line_length(shape, scheme)
    if isinstance(scheme.block, int):
        return min(scheme.block, line)
    return min(flat_block(scheme.block) or line, line)


def line_length(shape: tuple[int, int], scheme: Scheme) -> int:
    """Weights in a line of a tensor of `shape`; of patches, which are filled up, also those that there are not."""
    if (size := patch_size(shape, scheme)) is not None:
        return size[0] * -(-shape[1] // size[1]) * size[1]
    if scheme.block == "tensor" or flat_block(scheme.block):
        return shape[0] * shape[1]
    return shape[1] if scheme.axis == "in" else shape[0]


def scales_shape(shape: tuple[int, int], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the scales as they are stored: [out, blocks], [blocks, in] for axis "out", [blocks] for "flat:N"."""
    blocks = -(-line_length(shape, scheme) // block_length(shape, scheme))
    if (size := patch_size(shape, scheme)) is not None:
        return (-(-shape[0] // size[0]), blocks)
    if flat_block(scheme.block):
        return (blocks,)
    if scheme.block == "tensor":
        return (1, 1)
    return (shape[0], blocks) if scheme.axis == "in" else (blocks, shape[1])


def to_blocks(lines: Tensor, block: int) -> Tensor:
    """`lines` [lines, length] as [lines, blocks, block]; a short last block repeats its last value."""
    short = -lines.shape[1] % block
    if short:
        lines = torch.cat([lines, lines[:, -1:].expand(-1, short)], 1)  # [lines, blocks * block]
    return lines.reshape(len(lines), -1, block)  # [lines, blocks, block]


def stored_order(per_block: Tensor, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """Values per block [lines, blocks] in the order and shape of `scales_shape`."""
    wanted = scales_shape(shape, scheme)
    if scheme.axis == "out" and scheme.block != "tensor" and len(wanted) == 2:
        per_block = per_block.T  # [blocks, in]
    return per_block.reshape(wanted).contiguous()


def line_order(per_block: Tensor, scheme: Scheme) -> Tensor:
    """Values per block, shaped as `scales_shape`, as [lines, blocks]; undoes `stored_order`."""
    if per_block.dim() == 1:
        return per_block[None]  # [1, blocks]
    return per_block.T if scheme.axis == "out" and scheme.block != "tensor" else per_block


def spread(
    values: Tensor, shape: tuple[int, int], scheme: Scheme, first: int = 0, last: int | None = None
) -> Tensor:
    """Values per block, shaped as `scales_shape`, repeated over their weights: rows `first` to `last` of [out, in].

    Broadcastable rather than full where all weights of a row, of a column or of the tensor share a value.
    """
    last = shape[0] if last is None else last
    block = block_length(shape, scheme)
    if scheme.block == "tensor":
        return values  # [1, 1]
    if (size := patch_size(shape, scheme)) is not None:
        bands = values[
            torch.arange(first, last, device=values.device) // size[0]
        ]  # [rows, patches of a band]
        return _stretch(bands, size[1])[:, : shape[1]]  # [rows, in]
    if flat_block(scheme.block):
        begin, end = first * shape[1], last * shape[1]
        covering = values[begin // block : -(-end // block)].repeat_interleave(block)  # [blocks * block]
        return covering[begin % block :][: end - begin].view(-1, shape[1])  # [rows, in]
    if scheme.axis == "out":
        return values[torch.arange(first, last, device=values.device) // block]  # [rows, in]
    if values.shape[1] == 1:
        return values[first:last]  # [rows, 1]
    return _stretch(values[first:last], block)[:, : shape[1]]  # [rows, in]


def _stretch(values: Tensor, block: int) -> Tensor:
    """Each value [rows, blocks] repeated `block` times; several times faster than repeat_interleave."""
    return values.unsqueeze(-1).expand(-1, -1, block).reshape(len(values), -1)  # [rows, blocks * block]


def spread_rows(values: Tensor, shape: tuple[int, int], scheme: Scheme, rows: Tensor) -> Tensor:
    """As `spread`, for the rows listed in `rows` [n] in any order: [n, in] or broadcastable to it."""
    if scheme.block == "tensor":
        return values  # [1, 1]
    if (size := patch_size(shape, scheme)) is not None:
        return _stretch(values[rows // size[0]], size[1])[:, : shape[1]]  # [n, in]
    block = block_length(shape, scheme)
    if flat_block(scheme.block):
        position = rows[:, None] * shape[1] + torch.arange(shape[1], device=rows.device)  # [n, in]
        return values[position // block]  # [n, in]
    if scheme.axis == "out":
        return values[rows // block]  # [n, in]
    return _stretch(values[rows], block)[:, : shape[1]]  # [n, in]


def block_sums(x: Tensor, scheme: Scheme) -> Tensor:
    """Sums of `x` [out, in] over each block, in the shape of `scales_shape`."""
    shape = (x.shape[0], x.shape[1])
    block = block_length(shape, scheme)
    lines = lines_of(x, scheme, zeros=True)  # [lines, length]
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[1] % block))  # [lines, blocks * block]
    sums = lines.reshape(len(lines), -1, block).sum(-1)  # [lines, blocks]
    return stored_order(sums, shape, scheme)


CHUNK = 1 << 18
"""Weights that are worked on at a time: temporaries of a megabyte stay in the cache, and leave no holes in the heap."""


def row_chunks(shape: tuple[int, int], scheme: Scheme, weights: int = CHUNK) -> list[tuple[int, int]]:
    """Cut the rows into runs of about `weights` weights that no block crosses; one run where blocks cross rows."""
    if scheme.block == "tensor" or flat_block(scheme.block):
        return [(0, shape[0])]
    size = patch_size(shape, scheme)
    align = block_length(shape, scheme) if scheme.axis == "out" else 1 if size is None else size[0]
    rows = max(1, weights // max(1, shape[1] * align)) * align
    return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]
