"""The exchanged attention: taken where it fits, torch's where it does not, and the model's config as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import families
import fracbit.models.attention as attention
from fracbit.kernels.attention import attend_causal
from fracbit.kernels.cpu import NATIVE

TORCH = {"mistral", "mixtral", "gemma2", "qwen2_moe", "qwen3_moe", "bloom", "falcon"}
"""Families that bring a mask (a sliding window in every layer), a cap on scores or an attention of their own."""

here = pytest.mark.skipif(NATIVE is None or not NATIVE.has_causal(), reason="no native attention here")


def tiny(kind: str = "sdpa") -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.4}
    return families.tiny_llama(**sizes, attn_implementation=kind)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the native kernel saw."""
    seen: list[int] = []

    def counted(queries: torch.Tensor, *further: object) -> torch.Tensor:
        seen.append(queries.shape[2])
        return attend_causal(queries, *further)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend_causal", counted)
    return seen


@here
@torch.no_grad()
def test_logits_are_equal_and_every_layer_took_it(calls: list[int]) -> None:
    model, ids = tiny(), torch.arange(80).view(2, 40) % 50
    expected = model(input_ids=ids, use_cache=False).logits
    assert calls == []
    with attention.native_attention(model):
        found = model(input_ids=ids, use_cache=False).logits
    assert calls == [40, 40]
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@here
@pytest.mark.parametrize("name", families.CONFIGS)
@torch.no_grad()
def test_every_family_says_the_same(calls: list[int], name: str) -> None:
    """With heads of 16, which the kernel takes, over more tokens than it holds at once."""
    config = families.config_of(name)
    config.hidden_size = 64
    if hasattr(config, "head_dim") and config.model_type != "falcon":
        config.head_dim = 16
    model, ids = families.build(config), torch.arange(80).view(2, 40) % 60
    expected = model(input_ids=ids, use_cache=False).logits
    with attention.native_attention(model):
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert bool(calls) == (config.model_type not in TORCH)


@here
@pytest.mark.parametrize("case", ["padding", "gradients", "float64", "decoding", "eager"])
def test_everything_else_is_left_to_torch(calls: list[int], case: str) -> None:
    model, ids = tiny("eager" if case == "eager" else "sdpa"), torch.arange(40).view(2, 20)
    model = model.double() if case == "float64" else model
    mask = torch.ones_like(ids)
    mask[1, :3] = 0 if case == "padding" else 1
    with torch.set_grad_enabled(case == "gradients"):
        cache = model(input_ids=ids[:, :-1]).past_key_values if case == "decoding" else None
        ids, mask = (ids[:, -1:], mask) if case == "decoding" else (ids, mask)
        with attention.native_attention(model):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert calls == []


def test_the_config_is_put_back_after_an_error() -> None:
    model = tiny()
    with pytest.raises(KeyError), attention.native_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
