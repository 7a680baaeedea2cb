"""Norm tweaking: the closed form is optimal, both variants lower what they minimise, `auto` does no harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from evidence import quantized_block
from families import model_of
from fracbit.models.correction import error
from fracbit.models.find import family_of
from fracbit.models.tweak import Adam, Auto, distance, least_squares_factor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


Maker = Callable[..., "LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_auto_helps_or_leaves_alone(name: str, tiny_llama: Maker) -> None:
    model = tiny_llama() if name == "llama" else model_of("opt")
    block, evidence = quantized_block(model)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    report = Auto()(block, family_of(model), evidence, silent)
    assert report.after <= report.before
    assert error(block, evidence) == pytest.approx(report.after)
    changed = {key for key, value in block.state_dict().items() if not torch.equal(value, before[key])}
    assert all("norm" in key for key in changed)
    assert bool(changed) == (report.kept != "none")


def test_adam_lowers_the_distance(tiny_llama: Maker) -> None:
    model = tiny_llama()
    block, evidence = quantized_block(model)
    hidden = evidence.entrance

    def away() -> float:
        from fracbit.models.walk import forward

        with torch.no_grad():
            return sum(
                float(
                    distance(
                        forward(block, hidden.states[b.start : b.stop], b.calls[0]),
                        evidence.exits[b.start : b.stop],
                    )
                )
                for b in (hidden.batches[number] for number in evidence.train)
            )

    before = away()
    Adam(growth=0)(block, family_of(model), evidence, silent)
    assert away() < before
    assert isinstance(block.input_layernorm.weight, torch.nn.Parameter)


def test_closed_form_is_the_least_squares_answer() -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(300, 12, generator=random) @ torch.randn(12, 12, generator=random)
    weights = [torch.randn(8, 12, generator=random) for _ in range(2)]
    pairs = [(w, w * 0.8 + 0.3 * torch.randn(w.shape, generator=random)) for w in weights]
    # Both linears on the same inputs, and each on inputs (or tokens weighed) of its own.
    y = torch.randn(200, 12, generator=random) * torch.rand(12, generator=random)
    for seen in ([(x, pairs)], [(x, pairs[:1]), (y, pairs[1:])]):
        found = least_squares_factor([(inputs.T @ inputs, own) for inputs, own in seen], damping=0.0)

        def cost(factor: torch.Tensor, seen: Any = seen) -> float:
            return sum(
                float((inputs @ w.T - (inputs * factor) @ q.T).square().sum())
                for inputs, own in seen
                for w, q in own
            )

        best = cost(found)
        for _ in range(20):
            assert best <= cost(found + 0.05 * torch.randn(12, generator=random))
    assert torch.equal(least_squares_factor([(torch.zeros(12, 12), pairs)]), torch.ones(12))
