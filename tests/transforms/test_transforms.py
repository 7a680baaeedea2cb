"""Transforms one by one: rotations are orthogonal and spread outliers, factors even ranges and lower errors."""

from __future__ import annotations

import pytest
import torch

from families import model_of
from fracbit.errors import RecipeError
from fracbit.models.blocks import blocks, pairs
from fracbit.models.family import Norm
from fracbit.models.find import family_of
from fracbit.models.fold import fold_norm, rotate_block, rotate_rest, scaling_sites, storable
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.ranges import quantize_tensor
from fracbit.numerics.stats import add_inputs, empty
from fracbit.records.scheme import Scheme
from fracbit.transforms import awq_factors, smooth_factors
from fracbit.transforms.rotation import hadamard, random_signs, rotation, turn_columns, turn_inputs
from outputs import logits


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rotation_leaves_the_output(name: str) -> None:
    model = model_of(name)
    before = logits(model)
    family, turn = family_of(model), random_signs(40, seed=3)
    for _, block in blocks(model, family):
        rotate_block(block, family, turn)
    rotate_rest(model, family, turn)
    assert (logits(model) - before).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


def test_layer_norms_are_not_rotated() -> None:
    model = model_of("opt")
    family = family_of(model)
    with pytest.raises(RecipeError, match="does not commute"):
        rotate_block(blocks(model, family)[0][1], family, random_signs(40))


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


def test_storable_factors_leave_exact_gains() -> None:
    model = model_of("llama")
    family = family_of(model)
    block = blocks(model, family)[0][1]
    norm = scaling_sites(block, family, model.config)[0][1]
    assert isinstance(norm, Norm)
    factors = storable(block, family, norm, torch.linspace(0.2, 9, 40), torch.bfloat16)
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


def test_pairs_are_found() -> None:
    model = model_of("llama")
    family = family_of(model)
    assert {pair.source for pair in pairs(blocks(model, family)[0][1], family, model.config)} == {
        "self_attn.v_proj",
        "mlp.up_proj",
    }
