"""The Triton programs behind `gpu.py`; imported only where Triton is installed.

    y[n, o] = sum_i x[n, i] * (scale[b] * T[code(o, i)] + shift[b]),   b the block of weight (o, i)

Eight codes of k bits are k bytes, whatever k: a unit, which one thread loads, and from which it cuts codes by constant shifts.
Tiles are [n, rows, units, 8] with the eight in one thread, so that sums over them cost no exchange, and activations are read
once for all rows of a tile. `length` counts the quantized inputs of a row.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from fracbit.kernels.gpu import GpuWeight

EIGHT = tl.constexpr(8)
ONE = 0x3F800000  # the bits of 1.0
ALIGNED = 16  # numbers of a row that starts where loads of 16 bytes may: what Triton compiles a program for


@triton.jit
def _units(codes, first, u, inside, stride, BITS: tl.constexpr, LOAD: tl.constexpr):
    """Units `first` + `u` of the rows that begin at `codes`, as integers; `stride` counts what is loaded, integers or bytes."""
    at = u + first
    if LOAD == "unit":
        unit = tl.load(codes + first + u, mask=inside)
    elif LOAD == "words":  # the two words that hold it
        word = at * BITS // 4  # [1, 1, units, 1]
        low = (
            tl.load(codes + word, mask=inside).to(tl.uint32, bitcast=True).to(tl.int64)
        )  # [1, rows, units, 1]
        high = tl.load(codes + word + 1, mask=inside & (word + 1 < stride)).to(tl.int64)
        unit = ((high << 32) | low) >> (at * BITS % 4 * 8)
    else:
        unit = tl.zeros((1, 1, 1, 1), dtype=tl.int64)
        for k in tl.static_range(BITS):
            byte = at * BITS + k
            unit |= tl.load(codes + byte, mask=inside & (byte < stride), other=0).to(tl.int64) << (8 * k)
    return unit


@triton.jit
def _entries(table, o, BITS: tl.constexpr, FORM: tl.constexpr):
    """What `_values` looks up codes in: nothing, the table of all rows, or the tables of the rows `o`, one after another."""
    levels = tl.arange(0, 1 << BITS)  # [2^bits]
    if FORM == "even":
        entries = table  # not used
    elif FORM == "shared":
        entries = tl.load(table + levels)
    else:
        own = tl.load(table + (o[:, None] << BITS) + levels[None, :])  # [rows, 2^bits]
        entries = own.reshape(o.shape[0] << BITS)  # [rows * 2^bits]
    return entries


@triton.jit
def _values(unit, entries, one, BITS: tl.constexpr, FORM: tl.constexpr):
    """Values [1, rows, units, 8] of the codes of units [1, rows, units, 1]: entries or, on a line, 1 + code / 2^bits.

    The latter needs no conversion: the code is the upper bits of a mantissa. `one`, the bits of 1.0, is an argument, since the
    assembler would move a constant to a register anew for every code.
    """
    shifts = (tl.arange(0, EIGHT) * BITS)[None, None, None, :]  # [1, 1, 1, 8]
    code = (unit >> shifts).to(tl.int32) & ((1 << BITS) - 1)  # [1, rows, units, 8]
    if FORM == "even":
        value = ((code << (23 - BITS)) | one).to(tl.float32, bitcast=True)
    else:
        if FORM == "own":
            code |= (tl.arange(0, code.shape[1]) << BITS)[None, :, None, None]
        value = tl.gather(entries, code.reshape(code.shape[1] * code.shape[2] * EIGHT), 0).reshape(code.shape)
    return value


@triton.jit
def _blocks(
    o, i, start, length, blocks,
    BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, COMMON: tl.constexpr, TILE_U: tl.constexpr,
):  # fmt: skip
    """Where the scales of weights (o, i) lie; if `COMMON` is "eight", those of the units from `start` on, [1, rows, units, 1].

    The latter is a sum of a part of the warp and a part of the lane, so that constants end up in the load instruction.
    """
    if COMMON == "eight":
        UNITS: tl.constexpr = (BLOCK + EIGHT - 1) // EIGHT
        WARP: tl.constexpr = min(TILE_U, 32)
        warp, lane = tl.arange(0, TILE_U // WARP)[:, None], tl.arange(0, WARP)[None, :]
        at = o * blocks + start // BLOCK + (warp * WARP // UNITS + lane // UNITS).reshape(1, 1, TILE_U, 1)
    elif ALONG_OUT:
        at = o // BLOCK * length + i
    else:
        at = o * blocks + i // BLOCK
    return at


@triton.jit
def _numbers(values, at, inside):
    """Scales or shifts in fp32; zero outside."""
    return tl.load(values + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _eights(values, i, length, WHOLE: tl.constexpr):
    """Numbers of the eight inputs from each of `i` on, [n, 1, units, 8] in fp32; zero beyond `length`.

    In two loads of four, since more than 16 bytes in one would be spread over threads.
    """
    four = tl.arange(0, 4)[None, None, None, :]  # [1, 1, 1, 4]
    low = tl.load(values + i + four, mask=WHOLE | (i + four < length), other=0.0)  # [n, 1, units, 4]
    high = tl.load(values + 4 + i + four, mask=WHOLE | (i + four + 4 < length), other=0.0)
    both = tl.join(low, high).permute(0, 1, 2, 4, 3)  # [n, 1, units, 2, 4]
    return both.reshape(low.shape[0], 1, low.shape[2], EIGHT).to(tl.float32)


@triton.jit
def _eighth(tile, k: tl.constexpr):
    """Element `k` of the last axis, at no cost: a sum of integers, of which all but one are constants."""
    here = (tl.arange(0, EIGHT) == k)[None, None, None, :]  # [1, 1, 1, 8]
    number = tl.where(here, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(number, 3, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, total):
    """`total` + the sum of a * b over the last axis, as a chain of FMAs; `tl.sum` would multiply first and add as a tree."""
    for k in tl.static_range(EIGHT):
        total = tl.fma(_eighth(a, k), _eighth(b, k), total)
    return total


@triton.jit
def _dot_each(
    a, value, begin, span, total, scale, shift, o, i, length, blocks,
    BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, SHIFTED: tl.constexpr, FORM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`_dot` of activations and `_values` where every weight has its own scale: blocks that units do not divide."""
    for k in tl.static_range(EIGHT):
        at = _blocks(
            o, i + k, 0, length, blocks=blocks, BLOCK=BLOCK, ALONG_OUT=ALONG_OUT, COMMON="none", TILE_U=1
        )
        inside = WHOLE | (i + k < length)
        w = _eighth(value, k)  # [1, rows, units, 1]
        if FORM == "even":
            w += begin
        w *= _numbers(scale, at, inside)
        if SHIFTED:
            w += _numbers(shift, at, inside) / span
        total = tl.fma(_eighth(a, k), w, total)
    return total


@triton.jit(do_not_specialize=["stride"])
def _gemv(
    x, codes, scale, shift, table, y, one, n_rows, rows, length, width, stride, blocks,
    BITS: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, SHIFTED: tl.constexpr,
    FORM: tl.constexpr, COMMON: tl.constexpr, WHOLE: tl.constexpr,
    TILE_N: tl.constexpr, TILE_O: tl.constexpr, TILE_U: tl.constexpr,
):  # fmt: skip
    """Sums on the vector units, one for every row and unit of the tile: threads meet once, after the loop.

    A scale multiplies all that share it: activations, a sum of eight, or a weight. On a line, sums are in units of its
    span, and what `_values` added to the code is taken off the sum of activations. `stride` is not specialized: if it were
    known to be divisible, a thread would load neighbouring units, and their activations lie in other threads.
    """
    # The tile: rows `o` of the weight, rows `n` of the activations, units `u` of the input.
    first = tl.program_id(0) * TILE_O
    row = tl.minimum(first + tl.arange(0, TILE_O), rows - 1)  # [rows]
    entries = _entries(table, row, BITS, FORM)
    o = row.to(tl.int64)[None, :, None, None]  # [1, rows, 1, 1]
    n = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N))[:, None, None, None]  # [n, 1, 1, 1]
    u = tl.arange(0, TILE_U)[None, None, :, None]  # [1, 1, units, 1]
    x += tl.minimum(n, n_rows - 1).to(tl.int64) * width
    codes += o * stride
    span = tl.load(table + 1) if FORM == "even" else 1.0
    begin = tl.load(table) / span - 1 if FORM == "even" else 0.0
    # Over the input: codes to values, times activations, scaled where the scale is shared.
    sums = tl.zeros((TILE_N, TILE_O, TILE_U, 1), dtype=tl.float32)  # [n, rows, units, 1]
    for start in range(0, length, TILE_U * EIGHT):
        i = start + u * EIGHT
        inside = WHOLE | (i < length)
        unit = _units(
            codes, start // EIGHT, u, inside, stride=stride, BITS=BITS, LOAD=LOAD
        )  # [1, rows, units, 1]
        value = _values(unit, entries, one, BITS=BITS, FORM=FORM)  # [1, rows, units, 8]
        a = _eights(x, i, width, WHOLE)  # [n, 1, units, 8]
        if COMMON == "rows":
            group = (first // BLOCK).to(tl.int64) * length
            if SHIFTED:
                sums += tl.sum(a * _eights(shift + group, i, length, WHOLE), 3, keep_dims=True) / span
            a *= _eights(scale + group, i, length, WHOLE)
            if FORM == "even":
                sums += begin * tl.sum(a, 3, keep_dims=True)
            sums = _dot(a, value, sums)
        elif COMMON == "eight":
            at = _blocks(
                o, i, start, length, blocks=blocks, BLOCK=BLOCK, ALONG_OUT=ALONG_OUT, COMMON=COMMON, TILE_U=TILE_U
            )  # fmt: skip
            eight = tl.sum(a, 3, keep_dims=True)  # [n, 1, units, 1]
            part = tl.zeros((TILE_N, TILE_O, TILE_U, 1), dtype=tl.float32)  # [n, rows, units, 1]
            if FORM == "even":
                part += begin * eight
            sums = tl.fma(_dot(a, value, part), _numbers(scale, at, inside), sums)
            if SHIFTED:
                sums = tl.fma(eight / span, _numbers(shift, at, inside), sums)
        else:
            sums = _dot_each(
                a, value, begin, span, total=sums, scale=scale, shift=shift, o=o, i=i, length=length, blocks=blocks,
                BLOCK=BLOCK, ALONG_OUT=ALONG_OUT, SHIFTED=SHIFTED, FORM=FORM, WHOLE=WHOLE,
            )  # fmt: skip
    # Threads meet, and the tile is stored.
    total = span * tl.sum(tl.sum(sums, 3), 2)  # [n, rows]
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)[:, None]
    o = first + tl.arange(0, TILE_O)[None, :]
    tl.store(y + n.to(tl.int64) * rows + o, total, mask=(n < n_rows) & (o < rows))


@triton.jit
def _gemm(
    x, codes, scale, shift, table, y, one, n_rows, rows, length, width, stride, blocks,
    BITS: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr, ALONG_OUT: tl.constexpr, SHIFTED: tl.constexpr,
    FORM: tl.constexpr, COMMON: tl.constexpr, WHOLE: tl.constexpr,
    TILE_N: tl.constexpr, TILE_O: tl.constexpr, TILE_U: tl.constexpr,
):  # fmt: skip
    """Tiles of weights, decoded into registers and rounded to the type of `x`, on the matrix units."""
    # The tile: rows `o` of the weight, rows `n` of the activations, units `u` and eights of the input.
    first = tl.program_id(0) * TILE_O
    row = tl.minimum(first + tl.arange(0, TILE_O), rows - 1)  # [rows]
    entries = _entries(table, row, BITS, FORM)
    o = row.to(tl.int64)[None, :, None, None]  # [1, rows, 1, 1]
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)[:, None]  # [n, 1]
    u = tl.arange(0, TILE_U)[None, None, :, None]  # [1, 1, units, 1]
    eight = tl.arange(0, EIGHT)[None, None, None, :]  # [1, 1, 1, 8]
    column = tl.arange(0, TILE_U * EIGHT)[None, :]  # [1, units * 8]
    x += tl.minimum(n, n_rows - 1).to(tl.int64) * width
    codes += o * stride
    # Over the input: decode a tile of weights, scale it, multiply.
    total = tl.zeros((TILE_N, TILE_O), dtype=tl.float32)  # [n, rows]
    for start in range(0, length, TILE_U * EIGHT):
        i = start + u * EIGHT
        inside = WHOLE | (i < length)
        unit = _units(
            codes, start // EIGHT, u, inside, stride=stride, BITS=BITS, LOAD=LOAD
        )  # [1, rows, units, 1]
        w = _values(unit, entries, one, BITS=BITS, FORM=FORM)  # [1, rows, units, 8]
        if FORM == "even":
            least, span = tl.load(table), tl.load(table + 1)
            w = tl.fma(w, span, least - span)
        line = first.to(tl.int64) if COMMON == "rows" else o
        at = _blocks(
            line, i + eight, start, length, blocks=blocks, BLOCK=BLOCK, ALONG_OUT=ALONG_OUT, COMMON=COMMON, TILE_U=TILE_U
        )  # fmt: skip
        known = inside if COMMON == "eight" else WHOLE | (i + eight < length)
        w *= _numbers(scale, at, known)
        if SHIFTED:
            w += _numbers(shift, at, known)
        a = tl.load(x + start + column, mask=WHOLE | (start + column < width), other=0.0)  # [n, units * 8]
        w = w.reshape(TILE_O, TILE_U * EIGHT).to(a.dtype)  # [rows, units * 8]
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    o = first + tl.arange(0, TILE_O)[None, :]
    tl.store(y + n.to(tl.int64) * rows + o, total, mask=(n < n_rows) & (o < rows))


def _common(prepared: GpuWeight, tile_o: int, tile_i: int) -> str:
    """What shares a scale within a tile: all rows, the eight weights of a unit, or none."""
    block, (rows, _) = prepared.block, prepared.shape
    if prepared.along_out:
        return "rows" if prepared.length % ALIGNED == 0 and (block >= rows or block % tile_o == 0) else "none"
    fits = block % 8 == 0 and (block % tile_i == 0 or tile_i % block == 0)
    return "eight" if fits or block >= prepared.length else "none"


def constants_of(prepared: GpuWeight, x: Tensor, dot: bool) -> dict[str, Any]:
    """What the program is compiled for: the form of the weight, and tiles for `x`.

    GEMM decodes a weight again for every tile of rows, so many rows take large tiles; in fp32, which matrix units do not
    multiply exactly, registers suffice for 32. The tables of a tile's rows fit into 16 KB.
    """
    many = triton.next_power_of_2(len(x))
    if dot:
        tile_n, tile_u = min(max(many, 32), 32 if x.element_size() == 4 else 128), 8
        tile_o = min(64, 1 << 12 - prepared.bits) if prepared.form == "own" else 64
    else:
        tile_n, tile_o = min(many, 8), 8
        tile_u = min(max(256 // tile_n, 64), triton.next_power_of_2(triton.cdiv(prepared.length, 8)))
    return {
        "BITS": prepared.bits, "LOAD": prepared.load, "BLOCK": prepared.block, "ALONG_OUT": prepared.along_out,
        "SHIFTED": prepared.shift is not None, "FORM": prepared.form, "COMMON": _common(prepared, tile_o, 8 * tile_u),
        "WHOLE": prepared.length % (8 * tile_u) == 0, "TILE_N": tile_n, "TILE_O": tile_o, "TILE_U": tile_u,
    }  # fmt: skip


def options_of(dot: bool) -> dict[str, Any]:
    """How the program is compiled.

    GEMV takes two warps: the work around the loop costs half of what it does with four. GEMM takes two stages: with three, a
    scale for every weight and large tiles exceed the shared memory of GPUs smaller than an H100.
    """
    return {"num_warps": 4 if dot else 2, "num_stages": 2, "enable_fp_fusion": True}


def launch(prepared: GpuWeight, x: Tensor, y: Tensor, dot: bool) -> None:
    """Fill `y` [n, out] from `x` [n, width], zero beyond the weight; `dot` chooses matrix units (GEMM) over sums (GEMV)."""
    rows, (count, width) = prepared.shape[0], x.shape
    if count == 0:
        return
    constants = constants_of(prepared, x, dot)
    grid = (triton.cdiv(rows, constants["TILE_O"]), triton.cdiv(count, constants["TILE_N"]))
    shift = prepared.scale if prepared.shift is None else prepared.shift
    blocks = prepared.scale.numel() // rows if not prepared.along_out else 1
    (_gemm if dot else _gemv)[grid](
        x, prepared.codes, prepared.scale, shift, table=prepared.table, y=y, one=ONE, n_rows=count, rows=rows,
        length=prepared.length, width=width, stride=prepared.codes.shape[1], blocks=blocks, **constants, **options_of(dot),
    )  # fmt: skip
