"""Columns kept in 16 bits: every rule chooses what it says, more columns lose less and cost what is counted."""

from __future__ import annotations

import pytest
import torch

from fracbit.errors import WeightError
from fracbit.numerics import decode, stored_bits
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.quantizers import COLUMN_RULES, nearest, quantizer
from fracbit.records.scheme import Scheme

SCHEME = Scheme("int", 3, 20, offset="zero")


def given() -> tuple[torch.Tensor, Stats]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 60, generator=random)
    x[:, [7, 31]] *= 30
    return torch.randn(24, 60, generator=random), add_inputs(empty(60), x)


def chosen(rule: str, count: int, seed: int = 0, scheme: Scheme = SCHEME) -> torch.Tensor:
    weight, stats = given()
    spread = torch.arange(60.0).remainder(13)  # 12, 25, 38 and 51 are the largest
    return COLUMN_RULES[rule](
        weight,
        scheme,
        stats,
        count=count,
        generator=torch.Generator().manual_seed(seed),
        producer_spread=spread,
    )


@pytest.mark.parametrize("rule", COLUMN_RULES)
@pytest.mark.parametrize("count", [0, 1, 5, 60])
def test_a_rule_gives_so_many_different_columns_in_order(rule: str, count: int) -> None:
    columns = chosen(rule, count)
    assert columns.dtype == torch.int32
    assert columns.tolist() == sorted(set(columns.tolist()))
    assert len(columns) == count
    assert torch.equal(columns, chosen(rule, count))


def test_rules_choose_by_what_they_are_named_after() -> None:
    assert chosen("cost", 2).tolist() == [7, 31], "rounding hurts where inputs are large"
    assert chosen("activation", 2).tolist() == [7, 31]
    assert chosen("proxy", 4).tolist() == [12, 25, 38, 51]
    assert chosen("proxy", 2).tolist() == [12, 25], "ties go to the earlier column"
    assert chosen("random", 6, seed=1).tolist() != chosen("random", 6).tolist()


@pytest.mark.parametrize("rule", COLUMN_RULES)
def test_only_a_rule_that_needs_chance_follows_the_seed(rule: str) -> None:
    drawn = {tuple(chosen(rule, 6, seed=seed).tolist()) for seed in range(4)}
    assert (len(drawn) > 1) == ("chance" in COLUMN_RULES[rule].needs)


def test_without_data_the_cost_is_that_of_rounding_alone() -> None:
    weight, _ = given()
    weight[:, 40] += 3 * torch.randn(24, generator=torch.Generator().manual_seed(2))
    found = COLUMN_RULES["cost"](
        weight, Scheme("int", 3, 24, "out"), None, count=1, generator=torch.Generator()
    )
    assert found.tolist() == [40]


@pytest.mark.parametrize(("rule", "what"), [("activation", "energy"), ("proxy", "produces")])
def test_a_rule_that_lacks_what_it_needs_says_so(rule: str, what: str) -> None:
    weight, _ = given()
    assert COLUMN_RULES[rule].needs
    with pytest.raises(WeightError, match=f"{rule} .*{what}"):
        COLUMN_RULES[rule](weight, SCHEME, None, count=1, generator=torch.Generator())


@pytest.mark.parametrize("name", ["rtn", "gptq", "descent"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_more_columns_lose_less_and_cost_more(name: str, axis: str) -> None:
    weight, stats = given()
    scheme = Scheme("int", 3, 20, axis, "zero")
    columns = [None, *(chosen("cost", count, scheme=scheme) for count in (3, 12))]
    found = [quantizer(name)(weight, scheme, stats, columns=each) for each in columns]
    losses, bits = [q.loss for q in found], [stored_bits(q.packed) for q in found]
    assert losses[0] > losses[1] > losses[2]
    assert bits[0] < bits[1] < bits[2]
    kept = found[2].packed
    assert kept.columns is not None
    assert len(kept.columns) == 12
    if name == "rtn":
        numbers = kept.columns.long()
        assert torch.equal(decode(kept)[:, numbers], weight[:, numbers].half().float())


def test_no_columns_are_none() -> None:
    weight, stats = given()
    for fill in (nearest(True), quantizer("gptq", search=True)):
        found = fill(weight, SCHEME, stats, columns=chosen("cost", 0))
        assert found.packed.columns is None
        assert torch.equal(decode(found.packed), decode(fill(weight, SCHEME, stats).packed))
