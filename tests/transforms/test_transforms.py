"""Transforms: orthogonality and factor laws, and the law that a rewritten float model gives the same output."""

from __future__ import annotations

import pytest
import torch

from fracbit.errors import RecipeError
from fracbit.models.blocks import blocks, pairs
from fracbit.models.family import Norm
from fracbit.models.find import family_of
from fracbit.models.fold import fold_norm, fold_pair, rotate_block, rotate_rest, scaling_sites, storable, tie
from fracbit.numerics.grid import quantize_tensor
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import add_inputs, empty
from fracbit.records.scheme import Scheme
from fracbit.transforms import awq_factors, factors_of, smooth_factors
from fracbit.transforms.rotation import hadamard, random_signs, rotation, turn_columns, turn_inputs

IDS = torch.arange(3, 43)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def some_models() -> dict[str, object]:
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
        MixtralConfig,
        OPTConfig,
        Qwen2Config,
    )

    small = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "llama": LlamaConfig(
            **small, intermediate_size=132, num_key_value_heads=2, tie_word_embeddings=False
        ),
        "qwen2": Qwen2Config(**small, intermediate_size=60, num_key_value_heads=2, tie_word_embeddings=False),
        "opt": OPTConfig(**small, ffn_dim=60, word_embed_proj_dim=48, max_position_embeddings=64),
        "gpt2": GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64),
        "mixtral": MixtralConfig(**small, intermediate_size=40, num_key_value_heads=2, num_local_experts=3),
    }
    torch.manual_seed(0)
    return {name: AutoModelForCausalLM.from_config(config).eval() for name, config in configs.items()}


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    return some_models()


def roughen(model: torch.nn.Module) -> None:
    """Gains and biases unlike 1 and 0, so that forgetting one shows."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=random)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2", "mixtral"])
def test_folding_any_factors_leaves_the_output(models: dict[str, object], name: str) -> None:
    import copy

    from fracbit.models.experts import split_experts

    model = copy.deepcopy(models[name])
    roughen(model)
    split_experts(model)
    before = logits(model)
    family, random = family_of(model), torch.Generator().manual_seed(2)
    sites = 0
    for _, block in blocks(model, family):
        for readers, producer in scaling_sites(block, family, model.config):
            width = block.get_submodule(readers[0]).weight.shape[0 if name == "gpt2" else 1]
            factors = torch.exp(torch.randn(width, generator=random))
            if isinstance(producer, Norm):
                fold_norm(block, family, producer, factors)
            else:
                fold_pair(block, producer, tie(block, producer, factors, model.config), model.config)
            sites += 1
    assert sites >= 4
    assert (logits(model) - before).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rotation_leaves_the_output(models: dict[str, object], name: str) -> None:
    import copy

    model = copy.deepcopy(models[name])
    roughen(model)
    before = logits(model)
    family, turn = family_of(model), random_signs(48, seed=3)
    for _, block in blocks(model, family):
        rotate_block(block, family, turn)
    rotate_rest(model, family, turn)
    assert (logits(model) - before).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


def test_layer_norms_are_not_rotated(models: dict[str, object]) -> None:
    model = models["opt"]
    family = family_of(model)
    with pytest.raises(RecipeError, match="does not commute"):
        rotate_block(blocks(model, family)[0][1], family, random_signs(48))


@pytest.mark.parametrize("width", [1, 2, 12, 48, 64, 172])
def test_rotations_are_orthogonal(width: int) -> None:
    turn = rotation(width, seed=1)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert not torch.equal(turn, rotation(width, seed=2)) or width == 1


@pytest.mark.parametrize("width", [1, 3, 12, 80, 172, 184, 192, 4096])
def test_inputs_are_turned_without_the_large_matrix(width: int) -> None:
    """Sizes that are no power of two included: 172 = 4 x 43, 80 = 16 x 5, 184 = 8 x 23, 192 = 64 x 3."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, width, generator=random), torch.randn(5, width, generator=random)
    assert torch.allclose(
        turn_inputs(x) @ turn_columns(weight).T, x @ weight.T, rtol=1e-4, atol=1e-5 * width**0.5
    )
    if width < 4096:
        assert torch.allclose(turn_inputs(x.double()), x.double() @ hadamard(width), atol=1e-12)
    assert turn_inputs(x.bfloat16()).dtype == torch.bfloat16


def test_a_rotation_spreads_an_outlier() -> None:
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 8.0
    assert float((x @ rotation(64)).abs().max()) == pytest.approx(1.0)


def test_storable_factors_leave_exact_gains(models: dict[str, object]) -> None:
    import copy

    model = copy.deepcopy(models["llama"])
    roughen(model)
    family = family_of(model)
    block = blocks(model, family)[0][1]
    norm = scaling_sites(block, family, model.config)[0][1]
    assert isinstance(norm, Norm)
    factors = storable(block, family, norm, torch.linspace(0.2, 9, 48), torch.bfloat16)
    fold_norm(block, family, norm, factors)
    gain = block.input_layernorm.weight
    assert torch.allclose(gain.bfloat16().float(), gain, rtol=1e-6)


def outlier_stats(width: int = 64):  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(4)
    x = torch.randn(500, width, generator=random)
    x[:, 7] *= 40
    return add_inputs(empty(width), x), torch.randn(48, width, generator=random)


def test_smoothing_evens_the_ranges() -> None:
    stats, weight = outlier_stats()
    factors = smooth_factors([weight], [Scheme()], stats)
    inputs, columns = stats.absmax / factors, (weight * factors).abs().amax(0)
    assert torch.allclose(inputs, columns, rtol=1e-4)
    dead = add_inputs(empty(64), torch.zeros(3, 64))
    assert torch.equal(smooth_factors([weight], [Scheme()], dead), torch.ones(64))


def test_awq_lowers_the_error_and_leaves_output_blocks_alone() -> None:
    stats, weight = outlier_stats()
    scheme = Scheme("int", 3, 32)
    factors = awq_factors([weight], [scheme], stats)

    def loss(s: torch.Tensor) -> float:
        decoded = decode(quantize_tensor(weight * s, scheme)) / s
        return float(gram_errors(weight - decoded, stats.gram).sum())

    assert loss(factors) < 0.5 * loss(torch.ones(64))
    out = Scheme("int", 3, 32, "out")
    assert torch.equal(awq_factors([weight], [out], stats), torch.ones(64))


def test_unknown_names_are_answered() -> None:
    with pytest.raises(RecipeError, match="did you mean 'smooth'"):
        factors_of("smoth")


def test_pairs_are_found(models: dict[str, object]) -> None:
    model = models["llama"]
    family = family_of(model)
    assert {pair.source for pair in pairs(blocks(model, family)[0][1], family, model.config)} == {
        "self_attn.v_proj",
        "mlp.up_proj",
    }
