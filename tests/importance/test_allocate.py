"""Laws of the allocation: the budget is kept and used up, and the exact solver is the best there is."""

import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fracbit.errors import BudgetError, RecipeError
from fracbit.importance import (
    Budget,
    LayerShape,
    Unit,
    average_bits,
    best_uniform,
    by_order,
    cost_table,
    device_memory,
    exact,
    file_size,
    make_units,
    predict_losses,
    scheme_bits,
)
from fracbit.numerics import quantize_tensor, stored_bits
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores

INT = [Scheme("int", bits, 64, "in", "zero") for bits in (2, 3, 4, 8)]
POOL = [
    *INT, Scheme("nf", 4, 32), Scheme("nf", 4, 64), Scheme("kmeans:row", 3, "row"), Scheme("kmeans", 2, 64, scale="int8:256"),
    Scheme("int", 3, 32, "out", "float"), Scheme("int", 2, "flat:64"), Scheme("power", 4, "tensor", scale="fp32"), None,
]  # fmt: skip

units_strategy = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90)), min_size=2, max_size=5).map(
    lambda shapes: tuple(Unit(f"u{i}", {f"u{i}.w": shape}) for i, shape in enumerate(shapes))
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Unit, ...], list[Scheme | None], Budget, Losses]:
    choices = draw(st.lists(st.sampled_from(POOL), min_size=2, max_size=4, unique=True))
    some = st.none() | st.sets(st.sampled_from(choices), min_size=1).map(frozenset)
    units = tuple(replace(unit, levels=draw(some)) for unit in draw(units_strategy))
    costs = [cost.values() for cost in cost_table(units, choices)]
    bits = draw(st.integers(sum(map(min, costs)), sum(map(max, costs))))
    budget = Budget(bits, sum(unit.weights for unit in units), "average bits")
    row = st.tuples(*[st.floats(-1, 10).map(lambda x: round(x, 3)) for _ in choices])
    return (
        units,
        choices,
        budget,
        Losses(tuple(choices), {unit.name: draw(row) for unit in units}, "drawn", ""),
    )


def total(units: tuple[Unit, ...], choices: list[Scheme | None], picks: dict[str, int]) -> int:
    return sum(unit.bits(choices[picks[unit.name]]) for unit in units)


@given(st.sampled_from(POOL), st.integers(1, 40), st.integers(1, 90))
def test_costs_are_the_bits_that_are_stored(scheme: Scheme | None, out: int, width: int) -> None:
    expected = 16 * out * width
    if scheme is not None:
        expected = stored_bits(quantize_tensor(torch.randn(out, width), scheme))
    assert scheme_bits(scheme, (out, width)) == expected


@given(problems())
def test_the_order_keeps_the_budget_and_uses_it_up(problem: tuple) -> None:
    units, choices, budget, losses = problem
    scores = Scores({unit.name: losses.rows[unit.name][0] for unit in units}, "drawn", "")
    found = by_order(units, choices, budget, scores, losses)
    assert found.bits == total(units, choices, found.picks) <= budget.bits
    for unit in units:
        dearer = [
            cost
            for cost in map(unit.bits, filter(unit.takes, choices))
            if cost > unit.bits(choices[found.picks[unit.name]])
        ]
        assert (
            not dearer or found.bits - unit.bits(choices[found.picks[unit.name]]) + min(dearer) > budget.bits
        )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_exact_solver_is_the_best_of_all(problem: tuple) -> None:
    units, choices, budget, losses = problem
    found = exact(units, choices, budget, losses)
    assert found.bits == total(units, choices, found.picks) <= budget.bits
    best = math.inf
    for picks in itertools.product(range(len(choices)), repeat=len(units)):
        named = dict(zip((unit.name for unit in units), picks, strict=True))
        taken = all(unit.takes(choices[pick]) for unit, pick in zip(units, picks, strict=True))
        if taken and total(units, choices, named) <= budget.bits:
            best = min(best, sum(losses.rows[name][pick] for name, pick in named.items()))
    assert found.loss == pytest.approx(best, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_exact_solver_beats_the_order_and_leaves_no_useful_step(problem: tuple) -> None:
    units, choices, budget, losses = problem
    found = exact(units, choices, budget, losses)
    scores = Scores({unit.name: losses.rows[unit.name][0] for unit in units}, "drawn", "")
    assert found.loss <= by_order(units, choices, budget, scores, losses).loss + 1e-6
    uniform = best_uniform(units, choices, budget.bits, losses)
    assert uniform is None or (uniform.bits <= budget.bits and found.loss <= uniform.loss + 1e-6)
    for unit in units:
        pick, row = found.picks[unit.name], losses.rows[unit.name]
        room = budget.bits - found.bits + unit.bits(choices[pick])
        assert not [
            i
            for i, loss in enumerate(row)
            if unit.takes(choices[i]) and loss < row[pick] - 1e-6 and unit.bits(choices[i]) <= room
        ]


def test_a_large_model_is_solved_exactly_and_within_a_step() -> None:
    """32 blocks of a 7B Llama, single linears, ten levels: the miss is below the smallest step of any linear."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    units = tuple(Unit(f"{b}.{i}", {f"{b}.{i}": shape}) for b in range(32) for i, shape in enumerate(shapes))
    choices = [Scheme("nf", bits, block) for bits in (2, 3, 4, 5, 6) for block in (32, 128)]
    generator = torch.Generator().manual_seed(0)
    rows = {
        unit.name: tuple(w * 4.0**-scheme.bits * (1 + scheme.block / 256) for scheme in choices)
        for unit, w in zip(units, torch.rand(len(units), generator=generator).tolist(), strict=True)
    }
    losses = Losses(tuple(choices), rows, "drawn", "")
    weights = sum(unit.weights for unit in units)
    budget = average_bits(3.5, weights)
    found = exact(units, choices, budget, losses)
    assert found.notes == ()
    smallest = min(b - a for unit in units for a, b in itertools.pairwise(sorted(map(unit.bits, choices))))
    assert 0 <= budget.bits - found.bits < smallest
    assert found.loss < by_order(units, choices, budget, losses.scores(0, 9), losses).loss


def test_two_levels_and_equal_blocks_are_the_paper() -> None:
    """LLaMA-2-13B's example: 40 blocks, 30 at 4 bits and 10 at 2 are 3.5 bits, without what scales take."""
    units = tuple(Unit(f"l{i}", {f"l{i}": (64, 64)}) for i in range(40))
    choices = [Scheme(bits=2, block="tensor"), Scheme(bits=4, block="tensor")]
    scores = Scores({unit.name: float(i % 7) - i / 100 for i, unit in enumerate(units)}, "lim", "")
    found = by_order(units, choices, average_bits(3.5 + 16 / 4096, 40 * 4096), scores)
    lifted = [name for name, pick in found.picks.items() if pick == 1]
    assert len(lifted) == 30
    assert set(lifted) == set(scores.order()[:30])
    assert math.isnan(found.loss)


def test_units_of_blocks_of_linears_and_of_fused_linears() -> None:
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    groups = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
    layers = [LayerShape(f"{b}.{n}", (8, 8), str(b), f"{b}.{groups[n]}") for b in range(2) for n in names]
    assert [unit.name for unit in make_units(layers)] == ["0", "1"]
    assert len(make_units(layers, "linear")) == 14
    fused = make_units(layers, "linear", fused=True)
    assert [tuple(unit.shapes) for unit in fused[:2]] == [("0.q", "0.k", "0.v"), ("0.o",)]


def test_tied_layers_stay_together_and_cost_once() -> None:
    layers = [
        LayerShape("a", (8, 8), "0", "a"),
        LayerShape("b", (8, 8), "1", "b", tied="a"),
        LayerShape("c", (8, 8), "1", "c"),
    ]
    for units in (make_units(layers), make_units(layers, "linear")):
        assert units[0].shapes.keys() == {"a", "b"}
        assert units[0].bits(INT[0]) == scheme_bits(INT[0], (8, 8))
        assert units[0].weights == 64
    with pytest.raises(RecipeError, match="tied to a, which is not among"):
        make_units(layers[1:])


UNITS = tuple(Unit(f"u{i}", {f"u{i}.w": (16, 64)}) for i in range(4))
SCORES = Scores({unit.name: 1.0 for unit in UNITS}, "lim", "")


@pytest.mark.parametrize(("bits", "side"), [(1.0, "below the lowest"), (9.0, "above the highest")])
def test_a_budget_out_of_reach_prints_the_range(bits: float, side: str) -> None:
    with pytest.raises(BudgetError, match=rf"{side}.*2\.3750 bits per weight to 4\.3750 bits per weight"):
        by_order(UNITS, [INT[0], INT[2]], average_bits(bits, 4096), SCORES)


def test_bad_problems_are_refused() -> None:
    budget = average_bits(3.5, 4096)
    with pytest.raises(BudgetError, match="1 level leaves nothing to choose"):
        by_order(UNITS, [INT[0], INT[0]], budget, SCORES)
    with pytest.raises(BudgetError, match="1 unit leaves nothing"):
        by_order(UNITS[:1], INT, average_bits(3.5, 1024), Scores({"u0": 1.0}, "lim", ""))
    with pytest.raises(RecipeError, match="another model"):
        by_order(UNITS, INT, budget, Scores({"x": 1.0}, "lim", ""))
    with pytest.raises(RecipeError, match="do not cover int4z/64"):
        exact(UNITS, [INT[0], INT[2]], budget, Losses((INT[0],), {u.name: (1.0,) for u in UNITS}, "m", ""))


@pytest.mark.parametrize("bits", [0.0, -1.0, math.nan, math.inf])
def test_an_average_that_is_no_number_is_refused(bits: float) -> None:
    with pytest.raises(BudgetError, match="not a budget"):
        average_bits(bits, 10)


def test_budgets_in_bytes() -> None:
    assert file_size(1000, 100, 400).bits == 4800
    assert device_memory(1000, 100, 400).figure(80) == "410 bytes"
    with pytest.raises(BudgetError, match="take 1 kB already"):
        file_size(1000, 100, 1000)
    plenty = device_memory(10**9, 4096, 10**6)
    assert by_order(UNITS, [INT[0], INT[2]], plenty, SCORES).picks == dict.fromkeys(
        (u.name for u in UNITS), 1
    )
    with pytest.raises(BudgetError, match="above the highest"):
        by_order(UNITS, [INT[0], INT[2]], file_size(10**9, 4096, 10**6), SCORES)


def test_what_the_solver_prints_is_not_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HiGHS writes past Python, straight to the file descriptor."""
    import scipy.optimize

    solve = scipy.optimize.milp
    monkeypatch.setattr(
        scipy.optimize, "milp", lambda *args, **kwargs: (os.write(1, b"HiGHS"), solve(*args, **kwargs))[1]
    )
    losses = Losses((INT[0], INT[2]), {u.name: (1.0, 0.0) for u in UNITS}, "m", "")
    exact(UNITS, [INT[0], INT[2]], average_bits(3.5, 4096), losses)
    assert capfd.readouterr() == ("", "HiGHS")


def test_losses_from_scores() -> None:
    errors = Losses((INT[0], INT[2]), {"a": (0.4, 0.1), "b": (0.2, 0.1)}, "weight-error", "m")
    ranked = predict_losses(Scores({"a": -0.9, "b": -0.5}, "lim", "m"), errors)
    assert ranked.rows == {"a": (0.2, 0.05), "b": (0.2, 0.1)}
    measured = predict_losses(Scores({"a": 3.0, "b": 5.0}, "lens", "m", "sensitivity"), errors)
    assert measured.rows["b"] == (1.0, 0.5)
