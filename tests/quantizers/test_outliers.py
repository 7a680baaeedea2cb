"""Columns kept in 16 bits: the costliest are chosen, more of them lose less and cost what is counted."""

import pytest
import torch

from fracbit.errors import RecipeError
from fracbit.numerics import decode, stored_bits
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.quantizers import KeepColumns, quantizer
from fracbit.quantizers.outliers import costliest_columns
from fracbit.records.scheme import Scheme

SCHEME = Scheme("int", 3, 20, offset="zero")


def given() -> tuple[torch.Tensor, Stats]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 60, generator=random)
    x[:, [7, 31]] *= 30
    return torch.randn(24, 60, generator=random), add_inputs(empty(60), x)


def test_the_costliest_columns_are_the_ones_that_meet_large_inputs():
    weight, stats = given()
    assert costliest_columns(weight, SCHEME, stats.energy, 2 / 60).tolist() == [7, 31]


@pytest.mark.parametrize("name", ["rtn", "gptq", "descent"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_more_columns_lose_less_and_cost_more(name: str, axis: str):
    weight, stats = given()
    scheme = Scheme("int", 3, 20, axis, "zero")
    found = [quantizer(name, outliers=share)(weight, scheme, stats) for share in (0.0, 0.05, 0.2)]
    losses, bits = [q.loss for q in found], [stored_bits(q.packed) for q in found]
    assert losses[0] > losses[1] > losses[2]
    assert bits[0] < bits[1] < bits[2]
    kept = found[2].packed
    assert kept.columns is not None
    assert len(kept.columns) == 12
    if name == "rtn":
        columns = kept.columns.long()
        assert torch.equal(decode(kept)[:, columns], weight[:, columns].half().float())


def test_without_data_and_at_the_edges():
    weight, stats = given()
    fill = quantizer("gptq", search=True, outliers=0.1)
    assert isinstance(fill, KeepColumns)
    assert fill.search
    assert fill.needs == {"gram", "energy"}
    assert len(fill.nearest(True)(weight, SCHEME, None).packed.columns) == 6
    one = add_inputs(empty(1), torch.ones(4, 1))
    assert fill(weight[:, :1], SCHEME, one).packed.columns is None, "a single column is never kept"
    with pytest.raises(RecipeError, match="between 0 and 1"):
        costliest_columns(weight, SCHEME, stats.energy, 1.0)
