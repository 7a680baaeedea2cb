"""A grid with rows of another: what is stored stands for the one in some rows and for the other in the rest."""

from __future__ import annotations

import pytest
import torch

from fracbit.numerics import decode
from fracbit.numerics.grid import codes_in, grid_of, pack, scales_by_row, with_rows
from fracbit.numerics.ranges import quantize_tensor
from fracbit.records.scheme import parse_scheme

BY_ROW = [
    "int4/32", "int3z/32", "int:step4f/32", "ocp4/32 s=e8m0", "int:step4f/32 s=int:up6:8", "int:step2f/16 s=int:up4:16",
    "int:step6/16 s=int:step8:16", "int4z/16 s=int8:16", "nf4/16 s=int8:32",
]  # fmt: skip
SHARED = ["int4/32 out", "int4/tensor", "int4/flat:100", "int4/16 s=int8:64", "ocp4/16 s=ocp8:tensor"]


def two_weights() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 512, generator=generator) / 20
    return weight, torch.rand(6, 1, generator=generator) * weight


@pytest.mark.parametrize("word", BY_ROW)
def test_rows_of_two_grids(word: str) -> None:
    one, other = (quantize_tensor(weight, parse_scheme(word), search=True) for weight in two_weights())
    take = torch.tensor([True, False, False, True, True, False])
    grids = grid_of(one), grid_of(other)
    assert scales_by_row(grids[0])
    # Zero points are no part of what is taken: those of the other stand for the same codes.
    both = with_rows(grids[0], grids[1], take)
    codes = torch.where(take[:, None], codes_in(other), codes_in(one))
    if grids[0].zeros is None:
        wanted = torch.where(take[:, None], decode(other), decode(one))
        assert torch.equal(decode(pack(codes, both)), wanted)
    found = grid_of(pack(codes, both))
    assert torch.equal(found.scale, torch.where(take[:, None], grids[1].scale, grids[0].scale))
    for place, grid in enumerate(grids):
        assert torch.equal(with_rows(*grids, torch.full((6,), bool(place))).scale, grid.scale)


@pytest.mark.parametrize("word", SHARED)
def test_scales_that_rows_share_are_known(word: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    assert not scales_by_row(grid_of(quantize_tensor(weight, parse_scheme(word))))
