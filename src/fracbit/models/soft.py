"""`SoftLinear`: a quantized linear that can be trained; its output is that of its packed form.

    W = scale * T[nearest(u)] + shift         u: latent weights in units of the scale; a scale keeps its sign

Scale, shift and a fitted table are learned; scales that are quantized count as they are stored, on the grid that they came
with, and so do powers of 2; other float ones are rounded when it is packed. Quantized scales and shifts are kept within their
grid: beyond its ends they would move without effect, and come back late. The gradient of rounding is taken to be 1, for
weights outside the table's range 0 (straight-through, Bengio et al. 2013, arXiv:1308.3432; learned step sizes: Esser et al.
2019, arXiv:1902.08153). It lives only while a correction runs: `packed` turns it back into bytes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fracbit.numerics.datatypes import is_fitted, nearest_type
from fracbit.numerics.grid import Grid, codes_in, grid_of, least, moved, pack, span, with_table
from fracbit.numerics.layout import spread
from fracbit.numerics.packed import PackedTensor, quantized_columns


class SoftLinear(nn.Module):
    """Trainable stand-in for a `PackedTensor` [out, in]; fp32 inside, output in the type of `x`."""

    def __init__(self, packed: PackedTensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """`weight` [out, in] float places the latent weights between codes; None: on them."""
        super().__init__()
        self.base, self.packed_like = grid_of(packed), packed
        self.sign = torch.where(self.base.scale < 0, -1.0, 1.0)  # [per block]
        self.log_scale = nn.Parameter(self.base.scale.abs().clamp(min=1e-12).log())  # [per block]
        shift = self.base.shift
        self.free_shift = self.base.scheme.offset in ("float", "mean")
        self.shift = nn.Parameter(torch.zeros(0) if shift is None or not self.free_shift else shift.clone())
        self.scale_span, self.shift_span = self._spans()
        fitted = is_fitted(self.base.scheme)
        self.table = nn.Parameter(self.base.table.values.clone(), requires_grad=fitted)  # [1 or out, levels]
        self.latent = nn.Parameter(self._start(packed, weight))  # [out, quantized]
        self.bias = None if bias is None else nn.Parameter(bias.float().clone(), requires_grad=False)
        self.outliers = None if packed.outliers is None else nn.Parameter(packed.outliers.float())  # [out, p]

    def _spans(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """Between which numbers log scale and shift [per block] have an effect, where they are stored quantized."""
        scales, offsets, shape = self.base.scales, self.base.offsets, self.base.scale.shape
        scale_span = shift_span = None
        if isinstance(scales, PackedTensor):
            lowest, highest = span(scales, shape)  # [per block] each
            below, above = least(scales, shape)
            turned = self.sign < 0
            low, high = torch.where(turned, -below, above), torch.where(turned, -lowest, highest)
            now = self.log_scale.detach()  # a block of zeros may lie below
            low, high = (each.clamp(min=1e-12).log() for each in (low, high))
            scale_span = torch.minimum(low, now), torch.maximum(high, now)
        if isinstance(offsets, PackedTensor) and self.free_shift:
            shift_span = span(offsets, shape)
        return scale_span, shift_span

    def _stay(self) -> None:
        """Bring scale and shift back to where they have an effect."""
        with torch.no_grad():
            for parameter, limits in ((self.log_scale, self.scale_span), (self.shift, self.shift_span)):
                if limits is not None:
                    parameter.copy_(torch.clamp(parameter, *limits))

    def _start(self, packed: PackedTensor, weight: Tensor | None) -> Tensor:
        """Latent weights: the float ones where they round to the chosen code, else the nearest edge of its cell."""
        codes = codes_in(packed)  # [out, quantized]
        if weight is None:
            return self.base.table.look_up(codes)
        quantized = weight.float()
        if packed.columns is not None:
            quantized = quantized[:, quantized_columns(packed.columns, packed.shape[1])]  # [out, quantized]
        scale = self._spread(
            self.sign * self.base.scale.abs().clamp(min=1e-12)
        )  # [out, quantized] or broadcastable
        wanted = (
            quantized - self._spread_shift(self.base.scale, self.shift.detach())
        ) / scale  # [out, quantized]
        low, high = cell_of(self.base.table.values, self.base.table.boundaries, codes)  # [out, quantized]
        return torch.minimum(torch.maximum(wanted, low), high)

    def _spread(self, values: Tensor) -> Tensor:
        """Values [per block], broadcastable to [out, quantized]."""
        return spread(values, self.base.shape, self.base.scheme)

    def _spread_shift(self, scale: Tensor, shift: Tensor) -> Tensor:
        if self.free_shift:
            return self._spread(shift)
        if self.base.zeros is None:
            return scale.new_zeros(1, 1)  # [1, 1]
        zero = self.base.table.look_up(self.base.zeros).view(scale.shape)  # [per block]
        return self._spread(-scale * zero)

    def _scale(self) -> Tensor:
        """The scales [per block]; where they are powers of 2, with the values of the nearest ones."""
        scale = self.sign * self.log_scale.exp()  # [per block]
        if self.base.scheme.scale != "e8m0":
            return scale
        power = torch.round(self.log_scale.detach() / math.log(2)).int()  # [per block]
        return scale + (self.sign * torch.ldexp(torch.ones_like(scale), power) - scale).detach()

    def _as_stored(self) -> tuple[Tensor, Tensor]:
        """Scale and free shift [per block], differentiable; with the values of what is stored where that is quantized."""
        self._stay()
        scale, free = self._scale(), self.free_shift  # [per block]
        if isinstance(self.base.scheme.scale, str) and self.base.scheme.scale != "e8m0":
            return scale, self.shift
        with torch.no_grad():
            grid = moved(self.base, scale, self.shift if free else None, near=True)
        stored = scale + (grid.scale - scale).detach()  # [per block]
        if not free or grid.shift is None:
            return stored, self.shift
        return stored, self.shift + (grid.shift - self.shift).detach()

    def weight(self) -> Tensor:
        """The decoded weight [out, in], differentiable."""
        # Round the latent weights; inside the table's range gradients pass as if they were not rounded.
        learned = self.table.requires_grad
        table = nearest_type(self.table.detach().sort(dim=1).values) if learned else self.base.table
        latent = self.latent.detach()  # [out, quantized]
        values = look_up(self.table if learned else table.values, table.nearest(latent))  # [out, quantized]
        inside = (latent >= table.values[:, :1]) & (latent <= table.values[:, -1:])  # [out, quantized]
        values = values + torch.where(inside, self.latent - latent, 0.0)  # [out, quantized]
        # Scale them, and put the 16-bit columns beside them.
        scale, shift = self._as_stored()  # [per block] each
        quantized = values * self._spread(scale) + self._spread_shift(scale, shift)  # [out, quantized]
        if self.outliers is None:
            return quantized
        assert self.packed_like.columns is not None
        full = quantized.new_empty(self.packed_like.shape)  # [out, in]
        full = full.index_copy(1, quantized_columns(self.packed_like.columns, full.shape[1]), quantized)
        return full.index_copy(1, self.packed_like.columns.long(), self.outliers)  # [out, in]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out]."""
        return nn.functional.linear(x.float(), self.weight(), self.bias).to(x.dtype)

    def packed(self) -> PackedTensor:
        """The packed weight of its present values."""
        with torch.no_grad():
            table = self.table.detach().sort(dim=1).values  # [1 or out, levels]
            grid: Grid = with_table(self.base, table.half()) if self.table.requires_grad else self.base
            codes = grid.table.nearest(self.latent.detach())  # [out, quantized]
            shift = self.shift.detach() if self.free_shift else None
            grid = moved(grid, self._scale().detach(), shift, near=True)
            result = pack(codes, grid)
            if self.outliers is None:
                return result
            like = self.packed_like
            assert like.outliers is not None
            outliers = self.outliers.detach().to(like.outliers.dtype)  # [out, p]
            return replace(result, shape=like.shape, columns=like.columns, outliers=outliers)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Values of `codes` [rows, n] in `table` [1 or rows, levels], differentiable in the table."""
    if len(table) > 1:
        return table.gather(1, codes.long())  # [rows, n]
    found: Tensor = _OneTable.apply(table, codes.long())  # type: ignore[no-untyped-call]
    return found


class _OneTable(torch.autograd.Function):
    """`table[0][codes]`, whose gradient is one pass: torch's own for an index takes ten times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.levels = table.shape[1]
        return table[0][codes]  # [rows, n]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (codes,) = ctx.saved_tensors
        sums = torch.bincount(codes.flatten(), grads[0].flatten(), minlength=ctx.levels)  # [levels]
        return sums[None].to(grads[0].dtype), None


def cell_of(values: Tensor, boundaries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the interval that rounds to each code, a hair inside, each [rows, n]; open ones end at the outer values."""
    low = torch.cat([values[:, :1], boundaries], 1)  # [1 or rows, levels]
    high = torch.cat([boundaries, values[:, -1:]], 1)  # [1 or rows, levels]
    hair = 1e-3 * (high - low)  # [1 or rows, levels]
    return look_up(low + hair, codes), look_up(high - hair, codes)
