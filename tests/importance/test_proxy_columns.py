"""Proxy columns: the units with the widest weights, the controls, and where their outputs go in a real block."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fracbit.errors import RecipeError
from fracbit.importance.proxy_columns import largest_columns, random_columns, unit_spread
from fracbit.models.find import family_of
from fracbit.numerics.packed import outlier_count
from fracbit.sweeps.outliers import producer_scores


def test_the_spread_is_per_output_unit() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-3.0, 3.0]])
    assert unit_spread(weight).tolist() == [0.0, 1.0, 3.0]


def test_the_largest_columns_come_in_order() -> None:
    assert largest_columns(torch.tensor([1.0, 9.0, 3.0, 9.0, 5.0]), 0.4).tolist() == [1, 3]
    assert largest_columns(torch.tensor([2.0, 2.0, 2.0]), 0.3).tolist() == [0]


@pytest.mark.parametrize(
    ("inputs", "share", "kept"), [(100, 0.02, 2), (64, 0.02, 1), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_a_share_keeps_at_least_one_and_never_all(inputs: int, share: float, kept: int) -> None:
    assert outlier_count(inputs, share) == kept


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_its_range(share: float) -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        outlier_count(10, share)


def test_random_columns_are_distinct_and_follow_the_generator() -> None:
    drawn = [random_columns(50, 0.2, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 10


def test_scores_come_from_the_layer_that_produces_the_input() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    layers = model.model.layers
    with torch.no_grad():  # one conspicuous unit in each producer
        model.model.embed_tokens.weight[:, 3] *= 50
        layers[0].mlp.up_proj.weight[7] *= 50
        layers[0].self_attn.o_proj.weight[5] *= 50
        layers[0].mlp.down_proj.weight[9] *= 50
        layers[0].self_attn.v_proj.weight[8] *= 50  # the first unit of the second key-value head
    scores = producer_scores(model, family_of(model))
    found = {name.removeprefix("model.layers."): int(score.argmax()) for name, score in scores.items()}
    assert len(found) == 14
    assert {found[f"0.self_attn.{name}_proj"] for name in "qkv"} == {3}
    assert {found[f"0.mlp.{name}_proj"] for name in ("gate", "up")} == {5}
    assert found["0.mlp.down_proj"] == 7
    assert {found[f"1.self_attn.{name}_proj"] for name in "qkv"} == {9}
    # Heads 2 and 3 of the queries share the second key-value head: columns 16 and 24 of o.
    assert scores["model.layers.0.self_attn.o_proj"].topk(2).indices.sort().values.tolist() == [16, 24]
