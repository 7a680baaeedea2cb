"""Rounding a packed weight again, to a scheme that another format can hold, and what that loses."""

from __future__ import annotations

import torch

from fracbit.numerics.datatypes import fixed_type, is_fitted
from fracbit.numerics.grid import encode, grid_of, moved, plain
from fracbit.numerics.packed import PackedTensor, decode, stored_bits
from fracbit.numerics.ranges import fit
from fracbit.records.run import LayerRecord
from fracbit.records.scheme import Scheme


def requantized(packed: PackedTensor, scheme: Scheme) -> tuple[PackedTensor, LayerRecord]:
    """The weight in `scheme`, and its record: `loss` is the squared error relative to the weight that was decoded.

    Integers with the same blocks and offsets keep their codes: only their scales are rounded to the type of the new ones.
    Everything else is rounded to nearest, on the ranges of least error.
    """
    before = decode(packed)  # [out, in]
    again = (
        _restepped(packed, before, scheme)
        if _same_codes(packed, scheme)
        else encode(before, fit(before, scheme, search=True))
    )
    lost = decode(again).sub_(before).square_().sum(dtype=torch.float64)
    loss = float(lost / before.square().sum(dtype=torch.float64).clamp(min=1e-300))
    bits = stored_bits(again) / before.numel()
    return again, LayerRecord(scheme, loss, bits)


def _same_codes(packed: PackedTensor, scheme: Scheme) -> bool:
    """Whether both are evenly spaced, with the same blocks, bits and offsets, and scales that are floats now."""
    old = packed.scheme
    even = not is_fitted(old) and not is_fitted(scheme)
    even = even and fixed_type(old).step is not None and fixed_type(scheme).step is not None
    same = (old.bits, old.block, old.axis, old.offset) == (
        scheme.bits,
        scheme.block,
        scheme.axis,
        scheme.offset,
    )
    return even and same and packed.columns is None and isinstance(scheme.scale, str)


def _restepped(packed: PackedTensor, weight: torch.Tensor, scheme: Scheme) -> PackedTensor:
    """The same steps on the grid of `scheme`, from whose scales they are taken."""
    old, table = grid_of(packed), fixed_type(scheme)
    assert old.table.step is not None
    assert table.step is not None
    scale = old.scale * (old.table.step / table.step)  # [per block]
    shift = (
        None
        if old.shift is None or old.zeros is not None
        else old.shift + old.scale * old.table.low - scale * table.low
    )
    return encode(weight, moved(plain(weight, scheme), scale, shift, old.zeros))
