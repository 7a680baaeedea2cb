"""The Triton program behind `gpu.py`; imported only where Triton is installed.

    y[n, o] = sum_i x[n, i] * (scale[b] * T[o, code(o, i)] + shift[b]),   b the block of weight (o, i)

A code of k bits starts at bit i * k of its row: bytes i * k // 8 and the one after it, shifted by i * k % 8.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from fracbit.kernels.gpu import Prepared


@triton.jit
def _weights(
    codes, scale, shift, table, o, i, rows, kept, stride, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, SHIFTED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Weights [rows of o, inputs of i] in fp32; zero outside."""
    inside = (o[:, None] < rows) & (i[None, :] < kept)
    bit = i * BITS
    at = codes + o[:, None].to(tl.int64) * stride + (bit // 8)[None, :]
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may end in the next byte
        following = inside & ((bit // 8 + 1 < stride)[None, :])
        word |= tl.load(at + 1, mask=following, other=0).to(tl.int32) << 8
    code = (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
    if TABLE == "even":  # a line costs no look-up in memory
        least = tl.load(table)
        value = least + (tl.load(table + 1) - least) * code.to(tl.float32)
    elif TABLE == "own":
        value = tl.load(table + o[:, None] * (1 << BITS) + code, mask=inside, other=0.0)
    else:
        value = tl.load(table + code)
    if ALONG_OUT:
        block = (o // BLOCK)[:, None].to(tl.int64) * kept + i[None, :]
    else:
        block = o[:, None].to(tl.int64) * blocks + (i // BLOCK)[None, :]
    w = value * tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        w += tl.load(shift + block, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, w, 0.0)


@triton.jit
def _linear(
    x, codes, scale, shift, table, y, n_rows, rows, kept, stride, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, SHIFTED: tl.constexpr, TABLE: tl.constexpr,
    DOT: tl.constexpr, TILE_N: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    if DOT:
        total = tl.zeros((TILE_N, TILE_O), dtype=tl.float32)
    else:  # one sum for every place of the tile: threads meet once, after the loop
        sums = tl.zeros((TILE_N, TILE_O, TILE_I), dtype=tl.float32)
    for start in range(0, kept, TILE_I):
        i = start + tl.arange(0, TILE_I)
        w = _weights(
            codes,
            scale,
            shift,
            table,
            o,
            i,
            rows,
            kept,
            stride,
            blocks,
            BITS,
            BLOCK,
            ALONG_OUT,
            SHIFTED,
            TABLE,
        )
        inside = (n[:, None] < n_rows) & (i[None, :] < kept)
        a = tl.load(x + n[:, None].to(tl.int64) * kept + i[None, :], mask=inside, other=0.0)
        if DOT:
            total = tl.dot(a, tl.trans(w).to(a.dtype), total, input_precision="ieee")
        else:
            sums += a.to(tl.float32)[:, None, :] * w[None, :, :]
    if not DOT:
        total = tl.sum(sums, axis=2)
    tl.store(
        y + n[:, None].to(tl.int64) * rows + o[None, :],
        total,
        mask=(n[:, None] < n_rows) & (o[None, :] < rows),
    )


def constants_of(prepared: Prepared, count: int, dot: bool) -> dict[str, Any]:
    """What the program is compiled for: the form of the weight, and tiles for `count` rows of activations."""
    tile_n = 32 if dot else min(triton.next_power_of_2(count), 16)
    tile_o, tile_i = (64, 64) if dot else (max(1, 16 // tile_n), 256)
    return {
        "BITS": prepared.bits, "BLOCK": prepared.block, "ALONG_OUT": prepared.along_out,
        "SHIFTED": prepared.shift is not None, "TABLE": prepared.form,
        "DOT": dot, "TILE_N": tile_n, "TILE_O": tile_o, "TILE_I": tile_i,
    }  # fmt: skip


def launch(prepared: Prepared, x: Tensor, y: Tensor, dot: bool) -> None:
    """Fill `y` [n, out] fp32 from `x` [n, kept]; `dot` chooses matrix units (GEMM) over sums (GEMV)."""
    rows, (count, kept) = prepared.shape[0], x.shape
    if count == 0:
        return
    constants = constants_of(prepared, count, dot)
    grid = (triton.cdiv(rows, constants["TILE_O"]), triton.cdiv(count, constants["TILE_N"]))
    shift = prepared.scale if prepared.shift is None else prepared.shift
    blocks = prepared.scale.numel() // rows if not prepared.along_out else 1
    _linear[grid](
        x, prepared.codes, prepared.scale, shift, prepared.table, y, count, rows, kept, prepared.codes.shape[1], blocks,
        **constants,
    )  # fmt: skip
