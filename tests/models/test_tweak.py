"""Norm tweaking: the closed form is optimal, both variants lower what they minimise, `auto` does no harm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.models.tweak import Evidence, distance, error, least_squares_factor, tweak_block
from fracbit.models.walk import embed, observe
from fracbit.numerics import decode, quantize_tensor
from fracbit.numerics import stats as statistics
from fracbit.records.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

Maker = Callable[..., "LlamaForCausalLM"]


def quantized_block(model: PreTrainedModel) -> tuple[torch.nn.Module, Evidence]:
    """The first block with its linears at 2 bits, and what it is to be tweaked with."""
    family = family_of(model)
    block = blocks(model, family)[0][1]
    ids = torch.randint(3, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    hidden = embed(model, family, ids, 4)
    held: dict[str, statistics.Stats] = {}

    def add(name: str, x: torch.Tensor) -> None:
        held[name] = statistics.observe(held.get(name) or statistics.empty(x.shape[1]), x)

    order = groups(block, family)
    exits = observe(block, hidden, [group[0] for group in order], add)
    names = [name for group in order for name in group]
    weights = {name: weight_of(block.get_submodule(name)).clone() for name in names}
    block = copy.deepcopy(block)
    for name, weight in weights.items():
        set_weight(block.get_submodule(name), decode(quantize_tensor(weight, Scheme("int", 2, 24))))
    return block, Evidence(hidden, exits.states, [0, 1, 2], [3], weights, held)


def some_model(name: str, tiny_llama: Maker) -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    if name == "llama":
        return tiny_llama()
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(**sizes, ffn_dim=60, word_embed_proj_dim=48, max_position_embeddings=64)
    ).eval()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_auto_helps_or_leaves_alone(name: str, tiny_llama: Maker) -> None:
    model = some_model(name, tiny_llama)
    block, evidence = quantized_block(model)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    report = tweak_block(block, family_of(model), evidence, "auto", 0.5)
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
    tweak_block(block, family_of(model), evidence, "adam", 0.0)
    assert away() < before
    assert isinstance(block.input_layernorm.weight, torch.nn.Parameter)


def test_closed_form_is_the_least_squares_answer() -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(300, 12, generator=random) @ torch.randn(12, 12, generator=random)
    weights = [torch.randn(8, 12, generator=random) for _ in range(2)]
    pairs = [(w, w * 0.8 + 0.3 * torch.randn(w.shape, generator=random)) for w in weights]
    found = least_squares_factor(x.T @ x, pairs, damping=0.0)

    def cost(factor: torch.Tensor) -> float:
        return sum(float((x @ w.T - (x * factor) @ q.T).square().sum()) for w, q in pairs)

    best = cost(found)
    for _ in range(20):
        assert best <= cost(found + 0.05 * torch.randn(12, generator=random))
    assert torch.equal(least_squares_factor(torch.zeros(12, 12), pairs), torch.ones(12))
