"""A soft linear that nothing has trained is its packed weight, bit by bit, and powers of 2 do not jump."""

from __future__ import annotations

import pytest
import torch

from fracbit.models.soft import SoftLinear
from fracbit.numerics import decode, quantize_tensor
from fracbit.records.scheme import parse_scheme

WORDS = (
    "int:step4/32", "int:step3/16 s=int:step6:16", "int:step4f/32 s=int:up6:8", "iq4/32", "ocp4/16 s=ocp8:tensor",
    "ocp4/32 s=e8m0", "ocp8/32 s=e8m0", "nf4/64", "int3z/64", "kmeans3/64 s=int8:256",
)  # fmt: skip


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("word", WORDS)
def test_untrained_it_is_what_it_was(word: str, size: float) -> None:
    weight = size * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    packed = quantize_tensor(weight, parse_scheme(word), search=True)
    soft = SoftLinear(packed, None, None)
    expected = decode(packed)
    assert torch.allclose(decode(soft.packed()), expected, rtol=2e-3, atol=2e-3 * size)
    with torch.no_grad():
        assert torch.allclose(soft.weight(), expected, rtol=2e-3, atol=2e-3 * size)


@pytest.mark.parametrize("word", ["ocp4/32 s=e8m0", "ocp8/32 s=e8m0"])
def test_a_small_step_moves_no_power_of_2(word: str) -> None:
    packed = quantize_tensor(
        torch.randn(16, 256, generator=torch.Generator().manual_seed(0)), parse_scheme(word)
    )
    soft = SoftLinear(packed, None, None)
    with torch.no_grad():
        soft.log_scale.add_(0.01)
    assert torch.equal(decode(soft.packed()), decode(packed))
    with torch.no_grad():
        soft.log_scale.add_(0.5)
    assert torch.equal(decode(soft.packed()), 2 * decode(packed))


QUANTIZED = (
    "int:step4/32 s=int:step6:16",
    "int:step4f/32 s=int:up6:8",
    "nf4/64 s=int8:256",
    "int3f/32 s=int4:16",
)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("word", QUANTIZED)
def test_a_quantized_scale_comes_back_from_the_end_of_its_grid_at_once(word: str, direction: float) -> None:
    """However far it is pushed, the first step back of one level changes what is stored, and no block dies."""
    packed = quantize_tensor(
        torch.randn(16, 512, generator=torch.Generator().manual_seed(0)), parse_scheme(word), search=True
    )
    soft = SoftLinear(packed, None, None)
    pushed = [soft.log_scale, *([soft.shift] if soft.free_shift else [])]
    with torch.no_grad():
        for parameter in pushed:
            parameter.add_(30.0 * direction)
        end = soft.weight()
        for parameter in pushed:
            parameter.add_(30.0 * direction)
        assert torch.equal(soft.weight(), end)
        for parameter in pushed:
            parameter.sub_(0.7 * direction)
        back = soft.weight()
    assert torch.isfinite(end).all()
    assert torch.equal(decode(soft.packed()), back) or torch.allclose(decode(soft.packed()), back, rtol=2e-3)
    blocks = (back - end).abs().view(16, -1, packed.scheme.block).amax(-1)  # [out, blocks]
    assert (blocks > 0).float().mean() > 0.95
