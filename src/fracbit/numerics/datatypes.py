"""Data types: tables of numbers in [-1, 1]. An integer grid and a learned codebook are the same thing.

A type is made from (bits, parameter, full range or symmetric) or fitted to a tensor; no code branches on its name. The table of
types is in records/tables.py.
Values are ascending, and `boundaries[j]` separates code j from code j + 1. For every type but `power` the boundaries are
midpoints, so encoding is rounding to the nearest value; `power` rounds in its transformed space, as its paper does.

Refs: int, float, dynamic, quantile: Dettmers & Zettlemoyer 2022, arXiv:2212.09720, App. A. nf: Dettmers et al. 2023,
arXiv:2305.14314, App. E. power: Gong et al. 2024, arXiv:2403.06408 (exponent 1/3). kmeans: Lloyd 1982; weighted per row as
in Kim et al. 2023, arXiv:2306.07629.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fracbit.errors import SchemeError
from fracbit.records import tables
from fracbit.records.scheme import Scheme
from fracbit.records.tables import Table

FIT_SAMPLE = 1 << 20  # a quantile of a million values is known to 0.1 %; sorting more buys nothing
MANY = 1 << 12  # for fewer numbers cells are not worth making
MOST_CELLS = 1 << 16
LLOYD_STEPS = 60
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
OCP = {4: ("e2m1",), 6: ("e2m3", "e3m2"), 8: ("e4m3", "e5m2")}
EXPONENTS = ("0.2", "0.25", "1/3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")


@dataclass(frozen=True, eq=False)
class Cells:
    """[-1, 1] in cells of equal width, none with more than one boundary: a code is found without a search.

    `below` uint8 [cells + 1]: how many boundaries lie in earlier cells; `inside` fp32 [cells + 1]: the boundary in the cell,
    inf where there is none.
    """

    below: Tensor
    inside: Tensor

    def count(self, x: Tensor) -> Tensor:
        """How many boundaries are less than each finite `x`, uint8 of its shape: what `torch.bucketize` finds by a search."""
        cell = cell_of(x, len(self.below) - 1).reshape(-1)  # [numbers]
        more = x.reshape(-1) > self.inside.index_select(0, cell)  # [numbers]
        return self.below.index_select(0, cell).add_(more).view(x.shape)


def cell_of(x: Tensor, cells: int) -> Tensor:
    """The cell int32 of each `x`, never smaller for a larger x; what lies outside [-1, 1] is in the first or the last one."""
    place = torch.add(x, 1.0).mul_(cells / 2).clamp_(0, cells)
    return place.to(torch.int32).clamp_(min=0)  # a NaN gets a cell too


def make_cells(boundaries: Tensor) -> Cells | None:
    """Cells around `boundaries` [n] ascending: the fewest that are enough, None above `MOST_CELLS`."""
    cells = 2
    while cells <= MOST_CELLS:
        own = cell_of(boundaries, cells).long()  # [n]
        if bool((own[1:] > own[:-1]).all()):
            inside = torch.full((cells + 1,), torch.inf, device=boundaries.device)  # [cells + 1]
            holds = inside.new_zeros(cells + 1)  # [cells + 1]
            inside[own], holds[own] = boundaries, 1.0
            return Cells((holds.cumsum(0) - holds).to(torch.uint8), inside)
        cells *= 2
    return None


@dataclass(frozen=True, eq=False)
class DataType:
    """A table of numbers: `values` [rows, levels] fp32 ascending, `boundaries` [rows, levels - 1].

    rows is 1 unless the table is fitted per row. `step`: the spacing of an even table, None for any other. `span`: where the
    ends of a block's range are put; where they lie at unequal distances from 0, a scale may be negative. `unit`: scales are
    rounded as multiples of it, so that scale times unit is exact as stored.
    """

    values: Tensor
    boundaries: Tensor
    step: float | None = None
    span: tuple[float, float] = (-1.0, 1.0)
    unit: float = 1.0

    @property
    def levels(self) -> int:
        """How many values a row of the table holds."""
        return self.values.shape[-1]

    @property
    def low(self) -> float:
        """The value of code 0 in a table with one row that was not fitted."""
        return self.span[0]

    @property
    def lopsided(self) -> bool:
        """Whether one end of the span is farther from 0: then the sign of a scale says on which side of a block that end is."""
        return -self.span[0] != self.span[1]

    @property
    def far(self) -> float:
        """The end of the span that is farther from 0."""
        return max(self.span, key=abs)

    @cached_property
    def hollow(self) -> float:
        """Below so much 0 would be nearer than any value, in a table without 0; else 0."""
        magnitudes = self.values.abs().flatten().sort().values  # [levels]
        return 0.0 if float(magnitudes[0]) == 0 else float(magnitudes[1]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """Codes uint8 [rows, n] of `x` [rows, n]; a table with one row takes any number of rows."""
        if self.step is not None:
            top = self.levels - 1
            return torch.add(x, -self.low).div_(self.step).round_().clamp_(0, top).to(torch.uint8)
        if self.boundaries.shape[0] == 1:
            if x.numel() >= MANY and x.device.type == "cpu" and self.cells is not None:
                return self.cells.count(x)
            return torch.bucketize(x.contiguous(), self.boundaries[0], out_int32=True).to(torch.uint8)
        return torch.searchsorted(self.boundaries, x.contiguous(), out_int32=True).to(torch.uint8)

    @cached_property
    def cells(self) -> Cells | None:
        """The boundaries of a table with one row as cells, None when they lie too close together."""
        return make_cells(self.boundaries[0])

    def rows(self, first: int, last: int) -> DataType:
        """The table of rows `first` to `last`; itself when all rows share one."""
        if self.values.shape[0] == 1:
            return self
        return DataType(self.values[first:last], self.boundaries[first:last])

    def to(self, device: torch.device) -> DataType:
        """The same table on another device."""
        if self.values.device == device:
            return self
        return replace(self, values=self.values.to(device), boundaries=self.boundaries.to(device))

    def look_up(self, codes: Tensor) -> Tensor:
        """The values fp32 [rows, n] of `codes` [rows, n]; with one table for all rows, codes may have any shape."""
        if self.values.shape[0] == 1:
            return torch.take(self.values[0], codes.long())
        return self.values.gather(1, codes.long())  # [rows, n]


def nearest_type(values: Tensor) -> DataType:
    """A data type that rounds to the nearest of `values` [levels] or [rows, levels], ascending."""
    table = values if values.dim() == 2 else values[None]  # [rows, levels]
    middle = (table[:, 1:] + table[:, :-1]) / 2  # [rows, levels - 1]
    return DataType(table.float().contiguous(), middle.float().contiguous())


class Fit(Protocol):
    """Chooses the values of a type by looking at the tensor."""

    def __call__(self, x: Tensor, weights: Tensor, scales: Tensor, *, bits: int, parameter: str) -> Tensor:
        """The values [1 or out, levels] ascending; arguments as `fit_table`."""
        ...


@dataclass(frozen=True)
class DataTypeMaker:
    """How a data type is made: what its line in the table names.

    `make(bits, parameter, full)` makes a fixed type, `fit` the values of one that looks at the tensor. `parameters` are those
    that `fit` takes besides none; a type with both is fitted when it has one of them. `widths`: where not all from
    `min_bits` on.
    """

    min_bits: int
    make: Callable[[int, str, bool], DataType] | None = None
    fit: Fit | None = None
    parameters: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    def fits(self, parameter: str) -> bool:
        """Whether the type with this parameter looks at the tensor."""
        return self.fit is not None and (self.make is None or parameter in self.parameters)


def make_int(bits: int, parameter: str, full: bool) -> DataType:
    """Evenly spaced: 2^k - 1 symmetric values, or all 2^k when an offset places the range (`full`).

    `step`: the integers of engines, from -2^(k-1), or from 0 with an offset. `up`: from 0, a type for scales alone.
    """
    if parameter not in ("", "step", "up"):
        raise SchemeError(f"int takes the parameter step, up (for scales) or none, got {parameter!r}")
    if parameter == "up" and full:
        raise SchemeError("int:up begins at 0 and takes no offset; use int:step")
    levels = 2**bits if full or parameter == "up" else 2**bits - 1
    if levels < 2:
        raise SchemeError("a symmetric 1-bit int has one value; use an offset (zero or float), or more bits")
    if parameter:
        return _whole_steps(bits, full or parameter == "up")
    # Whole numbers first: linspace would miss an exact 0.
    numerators = torch.arange(levels, dtype=torch.float64) * 2 - (levels - 1)  # [levels]
    table = nearest_type(numerators / (levels - 1))
    return DataType(table.values, table.boundaries, 2.0 / (levels - 1))


def _whole_steps(bits: int, full: bool) -> DataType:
    """The integers -2^(k-1) to 2^(k-1) - 1, or 0 to 2^k - 1 (`full`), over a power of 2.

    An engine stores the step, scale * unit; both are exact in the same type.
    """
    half = 2 ** (bits - 1)
    low, unit = (0, 1 / (2 * half)) if full else (-half, 1 / half)
    table = nearest_type(torch.arange(low, low + 2 * half, dtype=torch.float64) * unit)  # [2^k]
    span = (low * unit, (low + 2 * half - 1) * unit)
    return replace(table, step=unit, span=span, unit=unit)


def make_iq(bits: int, parameter: str, full: bool) -> DataType:
    """The 4-bit table of llama.cpp's IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl) over 128; it has no 0."""
    _no_parameter("iq", parameter)
    table = nearest_type(torch.tensor(IQ4, dtype=torch.float64) / 128)
    return replace(table, span=(IQ4[0] / 128, IQ4[-1] / 128), unit=1 / 128)


def make_float(bits: int, parameter: str, full: bool) -> DataType:
    """Sign, E exponent bits, M mantissa bits, no NaN or Inf; larger exponent fields are smaller numbers.

    Bias 2^(E-1) + 1 (arXiv:2212.09720, App. A), which gives bitsandbytes' FP4 for E2M1. The default E is half of k,
    rounded up (App. C.4). +0 and -0 are one value, so a table has at most 2^k - 1 of them.
    """
    exponent, mantissa = _exponent_split(bits, parameter)
    bias = 2 ** (exponent - 1) + 1 if exponent else 0
    fractions = [i / 2**mantissa for i in range(2**mantissa)]
    magnitudes = {2.0**-bias * f for f in fractions}
    for field in range(1, 2**exponent):
        magnitudes |= {2.0 ** (bias + 1 - field) * (1 + f) for f in fractions}
    largest = max(magnitudes)
    signed = sorted({sign * m / largest for m in magnitudes for sign in (1, -1)})
    return nearest_type(torch.tensor(signed, dtype=torch.float64))


def make_ocp(bits: int, parameter: str, full: bool) -> DataType:
    """The small floats of the Open Compute Project and of GPUs: e2m1 (4 bits), e2m3, e3m2 (6), e4m3, e5m2 (8).

    Sign, exponent, mantissa, bias 2^(E-1) - 1, subnormal numbers; without NaN and infinity, of which only those of 8 bits have
    any. +0 and -0 are one value. All are divided by the power of 2 from the largest on.

    Ref: OCP Microscaling Formats 1.0 (2023), section 5.3.
    """
    splits = OCP[bits]
    if parameter not in ("", *splits):
        every = ", ".join(f"{name} ({k} bits)" for k, names in OCP.items() for name in names)
        raise SchemeError(f"ocp{f':{parameter}' * bool(parameter)} has no {bits} bits; there are {every}")
    exponent, mantissa = (int(digit) for digit in (parameter or splits[0])[1::2])
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    magnitudes = [2.0 ** (1 - bias) * i / steps for i in range(steps)]
    magnitudes += [2.0 ** (e - bias) * (1 + i / steps) for e in range(1, 2**exponent) for i in range(steps)]
    # In e4m3 the last code is NaN, in e5m2 those of the last exponent are infinity and NaN.
    magnitudes = magnitudes[: len(magnitudes) - {(4, 3): 1, (5, 2): steps}.get((exponent, mantissa), 0)]
    unit = 2.0 ** -math.ceil(math.log2(magnitudes[-1]))
    values = torch.tensor([*(-x for x in reversed(magnitudes[1:])), *magnitudes], dtype=torch.float64) * unit
    top = magnitudes[-1] * unit
    return replace(nearest_type(values), span=(-top, top), unit=unit)


def make_dynamic(bits: int, parameter: str, full: bool) -> DataType:
    """Dynamic exponent: a run of zeros is a decimal exponent, the rest a linear fraction of [0.1, 1]; plus 0 and 1."""
    _no_parameter("dynamic", parameter)
    n = bits - 1
    values = [0.0, 1.0]
    for i in range(n):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)  # [2^i + 1]
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - n + 1)).tolist()
        values += means + [-m for m in means]
    return nearest_type(torch.tensor(sorted(values), dtype=torch.float64))


def make_nf(bits: int, parameter: str, full: bool) -> DataType:
    """NormalFloat for any k: quantiles of a normal, 2^(k-1) above zero, 2^(k-1) - 1 below, zero itself, scaled to 1."""
    _no_parameter("nf", parameter)
    offset = 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4
    half = 2 ** (bits - 1)
    above = [_normal_quantile(offset, i, half) for i in range(half)]
    below = [-_normal_quantile(offset, i, half - 1) for i in range(half - 1)]
    table = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)  # [levels]
    return nearest_type(table / table.abs().max())


def make_power(bits: int, parameter: str, full: bool) -> DataType:
    """sign(x)|x|^a rounded to a symmetric integer grid in the transformed space; a is the parameter, 1/3 by default."""
    exponent = _power_exponent(parameter)
    top = 2 ** (bits - 1) - 1
    grid = torch.arange(-top, top + 1, dtype=torch.float64) / top  # [levels]
    middle = (grid[1:] + grid[:-1]) / 2  # [levels - 1]
    values, boundaries = (u.sign() * u.abs() ** (1 / exponent) for u in (grid, middle))
    return DataType(values[None].float(), boundaries[None].float())


def fit_power(x: Tensor, weights: Tensor, scales: Tensor, *, bits: int, parameter: str) -> Tensor:
    """The power type with the exponent of least squared error, rounding to the nearest value (PowerQuant's search).

    There are 2^k - 1 values; the largest stands twice in the table [1, 2^k].
    """
    sample, mass = _sample(x), _sample((weights * scales**2).expand_as(x))  # [numbers]
    best, table = float("inf"), x.new_zeros(1, 2**bits)
    for exponent in EXPONENTS:
        candidate = nearest_type(make_power(bits, exponent, False).values).to(x.device)
        rounded = candidate.look_up(candidate.nearest(sample[None]))[0]  # [numbers]
        error = float(((rounded - sample).square() * mass).sum())
        if error < best:
            best, table = error, torch.cat([candidate.values, candidate.values[:, -1:]], 1)
    return table


def fit_quantile(x: Tensor, weights: Tensor, scales: Tensor, *, bits: int, parameter: str) -> Tensor:
    """2^k - 1 quantiles of the whole tensor and a 0, divided by the largest: create_quantile_map, not Eq. 6 to the letter.

    `x` is the normalized tensor; its quantiles are taken in weight space (times `scales`), as the paper does.
    """
    _no_parameter("quantile", parameter)
    raw = _sorted(_sample(x * scales)).double()  # [numbers]
    count = 2**bits - 1
    off = 1 / (2 * count)
    shares = torch.linspace(off, 1 - off, count, dtype=torch.float64, device=raw.device)  # [count]
    ranks = shares * (len(raw) - 1)  # [count]
    low = ranks.floor().long()  # [count]
    quantiles = torch.lerp(raw[low], raw[(low + 1).clamp(max=len(raw) - 1)], ranks - low)  # [count]
    table = torch.cat([quantiles, quantiles.new_zeros(1)]).sort().values  # [levels]
    return (table / table.abs().max().clamp(min=1e-30))[None]


def fit_kmeans(x: Tensor, weights: Tensor, scales: Tensor, *, bits: int, parameter: str) -> Tensor:
    """Weighted 1-D k-means of the normalized tensor `x` [out, in], a table for the tensor or (`row`) one per output row."""
    if parameter not in ("", "tensor", "row"):
        raise SchemeError(f"kmeans takes the parameter tensor or row, got {parameter!r}")
    weights = weights * scales**2
    if parameter != "row":
        x, weights = _sample(x)[None], _sample(weights.expand_as(x))[None]  # [1, numbers]
    weights = weights.expand_as(x)  # [rows, numbers]
    runs = range(0, len(x), 256)  # rows at a time: the prefix sums are fp64
    return torch.cat([_lloyd(x[i : i + 256], weights[i : i + 256], 2**bits) for i in runs])


INT = DataTypeMaker(1, make=make_int)
OCP_FLOAT = DataTypeMaker(4, make=make_ocp, widths=tuple(OCP))
IQ = DataTypeMaker(4, make=make_iq, widths=(4,))
FLOAT = DataTypeMaker(2, make=make_float)
DYNAMIC = DataTypeMaker(2, make=make_dynamic)
QUANTILE = DataTypeMaker(2, fit=fit_quantile)
NORMAL_FLOAT = DataTypeMaker(2, make=make_nf)
POWER = DataTypeMaker(2, make=make_power, fit=fit_power, parameters=("fit",))
KMEANS = DataTypeMaker(1, fit=fit_kmeans, parameters=("tensor", "row"))
DATATYPES: Table[DataTypeMaker] = tables.DATATYPES


@lru_cache(maxsize=4096)
def check_datatype(scheme: Scheme) -> DataTypeMaker:
    """The maker of the scheme's data type. Raises `SchemeError` with near matches, or when the bits make no sense for it."""
    maker = _maker(scheme)
    if scheme.offset == "none" and not is_fitted(scheme) and fixed_type(scheme).span[0] >= 0:
        raise SchemeError(
            f"data type {scheme.dtype} has no negative values: it is a type for scales, not for weights"
        )
    if isinstance(scheme.scale, Scheme):
        _maker(scheme.scale)
        if scheme.offset == "mean" and counts_up(scheme.scale):
            raise SchemeError(
                f"scales {scheme.scale.dtype} have no sign, and means of blocks have two: use offset float or none"
            )
    return maker


def _maker(scheme: Scheme) -> DataTypeMaker:
    name, _, parameter = scheme.dtype.partition(":")
    maker = DATATYPES.load(name)
    if maker.widths and scheme.bits not in maker.widths:
        raise SchemeError(
            f"data type {name} has {' or '.join(map(str, maker.widths))} bits, got {scheme.bits}"
        )
    if scheme.bits < maker.min_bits:
        raise SchemeError(f"data type {name} needs at least {maker.min_bits} bits, got {scheme.bits}")
    if maker.make is not None and not maker.fits(parameter):
        maker.make(scheme.bits, parameter, _full(scheme))
    elif scheme.offset == "zero":
        raise SchemeError(
            f"data type {name} is fitted after the offset is known; use offset float or none, not zero"
        )
    elif parameter not in ("", *maker.parameters):
        takes = f"the parameter {' or '.join(maker.parameters)}" if maker.parameters else "no parameter"
        raise SchemeError(f"data type {name} takes {takes}, got {parameter!r}")
    return maker


@lru_cache(maxsize=4096)
def is_fitted(scheme: Scheme) -> bool:
    """Whether the table is fitted to the tensor and therefore stored with it."""
    return _maker(scheme).fits(scheme.dtype.partition(":")[2])


def fixed_type(scheme: Scheme) -> DataType:
    """The table of a data type that does not look at the tensor. Raises `SchemeError` for a fitted one."""
    return _fixed(scheme.dtype, scheme.bits, _full(scheme))


def scale_unit(scheme: Scheme) -> float:
    """The unit that scales are rounded in, of the scheme's table; 1 for a fitted one."""
    return 1.0 if is_fitted(scheme) else fixed_type(scheme).unit


def signed_scales(scheme: Scheme) -> bool:
    """Whether a scale may be negative: without an offset its sign turns a lopsided table over.

    Powers of 2 have none, and scales that count from 0 share one.
    """
    plain = scheme.offset == "none" and scheme.scale != "e8m0" and not is_fitted(scheme)
    return plain and not counts_up(scheme.scale) and fixed_type(scheme).lopsided


def counts_up(scale: str | Scheme) -> bool:
    """Whether scales are numbers from 0 up, as those of llama.cpp's K types with bottoms."""
    if isinstance(scale, str) or scale.offset != "none" or is_fitted(scale):
        return False
    return fixed_type(scale).span[0] >= 0


def fit_table(scheme: Scheme, x: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """Fit a table fp16 [1 or out, 2^bits] to the normalized `x` [out, in].

    `weights`: importances, broadcastable to [out, in]; `scales` [out, in]: what x was divided by.
    """
    maker, parameter = check_datatype(scheme), scheme.dtype.partition(":")[2]
    if maker.fit is None or not maker.fits(parameter):
        raise SchemeError(f"data type {scheme.dtype} is fixed: nothing to fit")
    return maker.fit(x, weights, scales, bits=scheme.bits, parameter=parameter).half()


@lru_cache(maxsize=256)
def _fixed(dtype: str, bits: int, full: bool) -> DataType:
    name, _, parameter = dtype.partition(":")
    maker = DATATYPES.load(name)
    if maker.make is None or maker.fits(parameter):
        raise SchemeError(f"data type {dtype} is fitted to each tensor: it has no table of its own")
    return maker.make(bits, parameter, full)


def _full(scheme: Scheme) -> bool:
    return scheme.offset in ("zero", "float")


def _no_parameter(name: str, parameter: str) -> None:
    if parameter:
        raise SchemeError(f"data type {name} takes no parameter, got {parameter!r}")


def _exponent_split(bits: int, parameter: str) -> tuple[int, int]:
    if not parameter:
        exponent = min((bits + 1) // 2, bits - 1)
        return exponent, bits - 1 - exponent
    match = re.fullmatch(r"e(\d)m(\d)", parameter.lower())
    splits = ", ".join(f"e{e}m{bits - 1 - e}" for e in range(1, bits))
    if match is None or int(match[1]) + int(match[2]) != bits - 1 or int(match[1]) < 1:
        raise SchemeError(f"float:{parameter} is not a split of {bits} bits; use one of {splits}")
    return int(match[1]), int(match[2])


def _power_exponent(parameter: str) -> float:
    try:
        exponent = float(Fraction(parameter or "1/3"))
    except (ValueError, ZeroDivisionError):
        raise SchemeError(
            f"power:{parameter} has no number after the colon; write power:1/2, power:0.4 or power:fit"
        ) from None
    if not 0.05 <= exponent <= 4:
        raise SchemeError(f"the exponent of power must lie in 0.05..4, got {parameter}")
    return exponent


def _normal_quantile(offset: float, i: int, count: int) -> float:
    """The i-th of `count` steps from `offset` down to (not including) the median, through the normal quantile function."""
    return NormalDist().inv_cdf(offset + (0.5 - offset) * i / count)


def _sample(x: Tensor) -> Tensor:
    """An evenly spaced sample of at most `FIT_SAMPLE` values: deterministic, and taken from every row."""
    flat = x.reshape(-1)  # [out * in]
    return flat if flat.numel() <= FIT_SAMPLE else flat[:: -(-flat.numel() // FIT_SAMPLE)]


def _sorted(x: Tensor) -> Tensor:
    """`x` [n] ascending. torch's sort also finds the order, which takes four times as long on a CPU."""
    plain = type(x) is Tensor and x.device.type == "cpu"
    return torch.from_numpy(np.sort(x.numpy())) if plain else x.sort().values


def _lloyd(x: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Lloyd's iteration for rows of numbers: sorted once, a step is a search for the boundaries in prefix sums.

    `x`, `weights` [rows, n]; returns [rows, levels] ascending, fp64. An empty cell keeps its value.
    """
    # Prefix sums over the sorted numbers.
    order = x.sort(dim=1)
    values = order.values.double()  # [rows, n]
    mass = weights.gather(1, order.indices).double() + 1e-30  # [rows, n]
    zero = values.new_zeros(len(values), 1)
    sums = torch.cat([zero, mass.cumsum(1)], 1)  # [rows, n + 1]
    moments = torch.cat([zero, (mass * values).cumsum(1)], 1)  # [rows, n + 1]
    # Each center moves to the mean of the numbers nearest to it.
    centers = _start(values, mass, levels)  # [rows, levels]
    searched = values.contiguous()  # sorting keeps a transposed layout
    for _ in range(LLOYD_STEPS):
        middle = ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()  # [rows, levels - 1]
        cut = torch.searchsorted(searched, middle)  # [rows, levels - 1]
        cut = torch.cat([torch.zeros_like(cut[:, :1]), cut, torch.full_like(cut[:, :1], values.shape[1])], 1)
        cell = sums.gather(1, cut).diff(dim=1)  # [rows, levels]
        mean = moments.gather(1, cut).diff(dim=1) / cell.clamp(min=1e-300)  # [rows, levels]
        centers = torch.where(cut.diff(dim=1) > 0, mean, centers)
    return centers.sort(dim=1).values


def _start(values: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Starting centers [rows, levels] by Panter & Dite: each gets an equal share of density^(1/3).

    Here the density's part is mass^(1/3) times spacing^(2/3).
    """
    spacing = torch.nn.functional.pad(values.diff(dim=1), (0, 1)).clamp(min=0)  # [rows, n]
    share = mass.pow(1 / 3) * spacing.pow(2 / 3) + 1e-30  # [rows, n]
    share = share.cumsum(1) / share.sum(1, keepdim=True)  # [rows, n]
    targets = (torch.arange(levels, dtype=torch.float64, device=values.device) + 0.5) / levels  # [levels]
    index = torch.searchsorted(share.contiguous(), targets.expand(len(values), -1).contiguous())
    return values.gather(1, index.clamp(max=values.shape[1] - 1))
