"""Variants of a model: shared states give the losses of whole evaluations, and every allocation of a small model is tried."""

import itertools
import statistics
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from fracbit.bundled import HELD_OUT, bundled_model, module_text, training_text
from fracbit.errors import DataError
from fracbit.importance import SCORES, average_bits, by_order, exact
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.study.float_model import (
    FloatModel,
    float_model_of,
    load_float,
    measure,
    replaced,
    rounded,
)
from fracbit.pipeline.study.variants import loss_table, losses_of
from fracbit.records.allocation import read_levels
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores

INT2, INT4 = read_levels("int2z/32,int4z/32")
IDS = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def float_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> FloatModel:
    return float_model_of(tiny_llama(initializer_range=0.3))


def options_of(
    float_model: FloatModel, *schemes: Scheme | None
) -> Callable[[int, int], Mapping[str, Tensor]]:
    units = float_model.weights.units()
    return lambda block, number: rounded(float_model, dict.fromkeys(units[block].shapes, schemes[number]))


def test_every_variant_has_the_loss_of_the_whole_model(float_model: FloatModel) -> None:
    units = float_model.weights.units()
    every = list(itertools.product((0, 1, 2), repeat=3))
    found = loss_table(float_model, reversed(every), options_of(float_model, None, INT2, INT4), IDS)
    assert sorted(found) == every
    for picks in every[::5]:
        schemes = {
            n: (None, INT2, INT4)[p] for p, unit in zip(picks, units, strict=True) for n in unit.shapes
        }
        with replaced(float_model, rounded(float_model, schemes)):
            assert found[picks] == pytest.approx(measure(float_model, IDS).nll, abs=1e-6)
    assert len({round(loss, 9) for loss in found.values()}) == len(every)


def test_single_layers_of_a_block_change_and_change_back(float_model: FloatModel) -> None:
    names = [f"model.layers.1.mlp.{n}_proj" for n in ("up", "down")]
    found = loss_table(
        float_model,
        [(0, n, 0) for n in range(3)],
        lambda block, number: rounded(float_model, {names[number - 1]: INT2}) if number else {},
        IDS,
    )
    for number, name in enumerate(names, 1):
        with replaced(float_model, rounded(float_model, {name: INT2})):
            assert found[0, number, 0] == pytest.approx(measure(float_model, IDS).nll, abs=1e-6)


def test_weights_come_back_also_when_something_raises(float_model: FloatModel) -> None:
    before = {name: tensor.clone() for name, tensor in float_model.model.state_dict().items()}
    option = options_of(float_model, INT2, INT4)

    def broken(block: int, number: int) -> Mapping[str, Tensor]:
        if block == 2 and number:
            raise KeyboardInterrupt
        return option(block, number)

    with pytest.raises(KeyboardInterrupt):
        loss_table(float_model, [(0, 1, 0), (1, 0, 1)], broken, IDS)
    next(losses_of(float_model, [(0, 0, 0)], option, IDS))  # dropped in the middle
    assert all(torch.equal(tensor, before[name]) for name, tensor in float_model.model.state_dict().items())
    with pytest.raises(DataError, match="longer than the model's"):
        loss_table(float_model, [(0, 0, 0)], option, IDS.repeat(1, 40))


def test_every_allocation_is_tried_and_no_method_beats_the_best() -> None:
    """The bundled model has three blocks, so eight allocations of 4 and 3 bits, and the best for a budget is known.

    Each method's distance to it is 0 or more, the oracle's less than that of random orders. docs/importance.md reports the
    distances on all models.
    """
    float_model = load_float(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    seen, unseen = (
        torch.tensor(tokenizer(text)["input_ids"][: 8 * 96]).view(8, 96)
        for text in (training_text(4000), module_text(HELD_OUT[2]))
    )
    levels = read_levels("int4z/64,int3z/64")
    units = float_model.weights.units()
    tried = loss_table(
        float_model, itertools.product((0, 1), repeat=3), options_of(float_model, *levels), unseen
    )
    weights = sum(unit.weights for unit in units)
    cost = {picks: sum(u.bits(levels[p]) for u, p in zip(units, picks, strict=True)) for picks in tried}
    budgets = [average_bits(bits, weights) for bits in (3.85, 4.15)]

    def distances(scores: Scores) -> list[float]:
        found = []
        for budget in budgets:
            solved = by_order(units, levels, budget, scores)
            picks = tuple(solved.picks[unit.name] for unit in units)
            best = min(loss for other, loss in tried.items() if cost[other] <= budget.bits)
            found.append(tried[picks] - best)
        return found

    far = {
        name: distances(make_scores(float_model, units, name, levels[1], seen))
        for name in SCORES if name != "random"
    }  # fmt: skip
    far |= {f"random {s}": distances(make_scores(float_model, units, "random", seed=s)) for s in range(5)}
    assert all(distance >= 0 for each in far.values() for distance in each)
    at_random = statistics.fmean(d for name, each in far.items() if name.startswith("random") for d in each)
    assert statistics.fmean(far["oracle"]) < at_random
    losses = make_losses(float_model, units, "oracle", levels, seen)
    for budget in budgets:
        solved = exact(units, levels, budget, losses)
        order = by_order(units, levels, budget, losses.scores(1, 0), losses)
        assert solved.loss <= order.loss + 1e-9
