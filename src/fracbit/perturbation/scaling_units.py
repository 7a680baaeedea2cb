"""Scaling units: the numbers that a quantizer would put on one scale, as rows, so that a perturbation can match each in L2.

Matching over a whole tensor would give a few large channels all the energy; the error of a quantizer is bounded per block,
channel or token, so that is where intensities must be equal (methods.md, section 4c).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fracbit.numerics.layout import block_length, lines_of
from fracbit.records.scheme import Scheme

UnitOf: TypeAlias = Scheme | Literal["row", "tensor"]
"""The blocks of a scheme; a row of the last dimension (an output channel of a weight, a token of an activation); all of it."""


def to_units(x: Tensor, unit: UnitOf) -> tuple[Tensor, Tensor]:
    """`x` as [units, length] and a mask of the same shape that is False where a short block was filled up with zeros."""
    if unit == "row":
        rows = x.reshape(-1, x.shape[-1])
    elif unit == "tensor":
        rows = x.reshape(1, -1)
    else:
        lines = lines_of(x, unit)
        block = block_length((x.shape[0], x.shape[1]), unit)
        short = -lines.shape[1] % block
        rows = torch.nn.functional.pad(lines, (0, short)).reshape(-1, block)
        real = torch.ones(1, lines.shape[1], dtype=torch.bool, device=x.device)
        mask = torch.nn.functional.pad(real, (0, short)).reshape(-1, block)
        return rows, mask.repeat(len(lines), 1)
    return rows, torch.ones_like(rows, dtype=torch.bool)


def from_units(rows: Tensor, x: Tensor, unit: UnitOf) -> Tensor:
    """Inverse of `to_units`: `rows` [units, length] in the shape of `x`."""
    if isinstance(unit, str):
        return rows.reshape(x.shape)
    lines = lines_of(x, unit)
    cut = rows.reshape(len(lines), -1)[:, : lines.shape[1]]
    if isinstance(unit.block, int) or unit.block == "row":
        return cut if unit.axis == "in" else cut.T
    return cut.reshape(x.shape)
