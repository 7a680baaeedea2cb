"""Scaling groups: the numbers that a quantizer would put on one scale, as rows, so that a perturbation can match each in L2.

Matching over a whole tensor would give a few large channels all the energy; the error of a quantizer is bounded per block,
channel or token, so that is where intensities must be equal (methods.md, section 4c).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fracbit.numerics.layout import block_length, from_patches, lines_of
from fracbit.records.scheme import Scheme, patch_block

ScalingGroups: TypeAlias = Scheme | Literal["row", "tensor"]
"""The blocks of a scheme; a row of the last dimension (an output channel of a weight, a token of an activation); all of it."""


def to_groups(x: Tensor, groups: ScalingGroups) -> tuple[Tensor, Tensor]:
    """`x` as [groups, length] and a mask of the same shape that is False where a short block was filled up with zeros.

    `x` is [..., n]; for the blocks of a scheme, a weight [out, in].
    """
    if groups == "row":
        rows = x.reshape(-1, x.shape[-1])  # [rows, length of a row]
    elif groups == "tensor":
        rows = x.reshape(1, -1)  # [1, all numbers]
    else:
        lines = lines_of(x, groups, zeros=True)  # [lines, length of a line]
        block = block_length((x.shape[0], x.shape[1]), groups)
        short = -lines.shape[1] % block
        rows = torch.nn.functional.pad(lines, (0, short)).reshape(
            -1, block
        )  # [lines x blocks of a line, block]
        real = lines_of(torch.ones_like(x, dtype=torch.bool), groups, zeros=True)  # [lines, length of a line]
        return rows, torch.nn.functional.pad(real, (0, short)).reshape(-1, block)  # [groups, block] each
    return rows, torch.ones_like(rows, dtype=torch.bool)


def from_groups(rows: Tensor, x: Tensor, groups: ScalingGroups) -> Tensor:
    """Inverse of `to_groups`: `rows` [groups, length] in the shape of `x`."""
    if isinstance(groups, str):
        return rows.reshape(x.shape)
    if patch_block(groups.block) is not None:
        return from_patches(rows, (x.shape[0], x.shape[1]), groups)
    lines = lines_of(x, groups)  # [lines, length of a line]
    cut = rows.reshape(len(lines), -1)[:, : lines.shape[1]]  # [lines, length of a line]
    if isinstance(groups.block, int) or groups.block == "row":
        return cut if groups.axis == "in" else cut.T  # [out, in]
    return cut.reshape(x.shape)
