"""The native decode step computes what the model computes, token by token; its cache is one that transformers knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from fracbit.errors import KernelError
from fracbit.kernels import DecoderShape, NativeDecoder
from fracbit.kernels.cpu import NATIVE
from fracbit.models.cache import cache_bytes
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead
from fracbit.models.step import LAYERS, Decoder, obstacle
from fracbit.models.store_cache import StoreCache
from fracbit.numerics import quantize_tensor
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 132, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": None, "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, hf.PreTrainedConfig] = {
    "llama": hf.LlamaConfig(**SIZES),
    "biased": hf.LlamaConfig(**SIZES | {"attention_bias": True, "mlp_bias": True}),
    "tied": hf.LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "rotation": hf.LlamaConfig(**SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "wide heads": hf.LlamaConfig(**SIZES | {"head_dim": 80, "num_key_value_heads": 4}),
    "mistral": hf.MistralConfig(**SIZES | {"sliding_window": None}),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen3": hf.Qwen3Config(**SIZES),
}  # fmt: skip


def packed(module: nn.Linear, scheme: Scheme) -> QuantLinear:
    layer = QuantLinear(scheme, tuple(module.weight.shape), bias=module.bias is not None)
    layer.fill(quantize_tensor(module.weight.detach().float(), scheme))
    layer.bias = module.bias
    return layer


def small(
    config: hf.PreTrainedConfig, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model whose blocks are packed, but for one layer; a tied table is packed too."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, part in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.uniform_(part, 0.3, 1.5)
    schemes = [scheme or Scheme("nf", 4, 16), scheme or Scheme("int", 3, 32, offset="zero")]
    for index, block in enumerate(model.model.layers):
        for name in LAYERS:
            if (index, name) != (1, "self_attn.k_proj"):
                block.set_submodule(
                    name, packed(block.get_submodule(name), schemes[name.startswith("mlp.up")])
                )
    if config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        embedding = QuantEmbedding(Scheme("int", 8, 16), tuple(table.shape), dtype)
        embedding.fill(quantize_tensor(table.detach().float(), embedding.scheme))
        model.model.embed_tokens, model.lm_head = embedding, TiedHead(embedding)
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def both(
    model: PreTrainedModel, batch: int = 1, pad: int = 0, prompt: int = 7, tokens: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, batch, vocabulary] of the native step and of the model; the first sequence has `pad` masked tokens."""
    ids = torch.randint(3, 60, (batch, prompt + tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits[:, prompt:]
        cache, decoder = StoreCache(model.config), Decoder(model)
        model(
            ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            position_ids=positions[:, :prompt],
            past_key_values=cache,
        )
        steps = [decoder.advance(ids[:, prompt + i], (mask == 0).sum(1), cache) for i in range(tokens)]  # fmt: skip
    return torch.stack(steps, 1), whole.float()


@native
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_models_own(name: str) -> None:
    for batch, pad in ((1, 0), (5, 3)):
        found, expected = both(small(MODELS[name]), batch, pad)
        assert distance(found, expected) < 1e-5, (batch, pad)


OTHERS = [Scheme("int", 4, 16, "out"), Scheme("int", 8, "row"), Scheme("kmeans:row", 2, 20)]


@native
@pytest.mark.parametrize("scheme", OTHERS, ids=str)
def test_any_scheme_takes_the_step(scheme: Scheme) -> None:
    assert distance(*both(small(MODELS["llama"], scheme), 2)) < 1e-5


@native
def test_eight_bit_activations_and_sixteen_bit_models() -> None:
    model = small(MODELS["llama"])
    exact = both(model)[1]
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.choose("int8")
    found, expected = both(model)
    assert 1e-4 < distance(found, exact) < 3e-2
    assert distance(found, expected) < 2e-2
    found, expected = both(small(MODELS["llama"], dtype=torch.bfloat16))
    assert distance(found, expected) < 2e-2


@native
def test_the_store_grows_and_keeps_what_it_held() -> None:
    assert distance(*both(small(MODELS["qwen3"]), 1, 0, 60, 10)) < 1e-5  # it begins with room for 64


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hf.MistralConfig(**SIZES | {"sliding_window": 5}), "sliding window"),
        (
            hf.Qwen2Config(
                **SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
            ),
            "sliding",
        ),
        (hf.GraniteConfig(**SIZES), "granite"),
        (hf.LlamaConfig(**SIZES | {"hidden_act": "gelu"}), "gelu"),
        (
            hf.LlamaConfig(
                **SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
            ),
            "dynamic",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@native
def test_what_stands_in_the_way_is_named(config: hf.PreTrainedConfig, words: str) -> None:
    model = small(config)
    assert words in str(obstacle(model))
    with pytest.raises(KernelError, match=words):
        Decoder(model)


@native
def test_layers_that_stand_in_the_way() -> None:
    torch.manual_seed(0)
    assert obstacle(hf.LlamaForCausalLM(MODELS["llama"])) == "its blocks are not quantized"
    model = small(MODELS["llama"])
    assert obstacle(model) is None
    first = model.model.layers[0]
    first.mlp.up_proj.choose("int8")
    assert "differ" in str(obstacle(model))
    first.mlp.up_proj.choose("float")
    first.mlp.up_proj.inputs = Inputs("int", 8, "token")
    assert "rounds activations" in str(obstacle(model))
    first.mlp.up_proj.inputs, first.mlp.down_proj.rotated = None, True
    assert "rotates activations" in str(obstacle(model))
    assert "computes in torch.float64" in str(obstacle(model.double()))


def test_the_store_is_a_cache(tiny_llama: Callable[..., hf.LlamaForCausalLM]) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 90, (2, 90), generator=torch.Generator().manual_seed(0))
    plain, store = DynamicCache(config=model.config), StoreCache(model.config)
    with torch.no_grad():
        for part in ids.split([50, 1, 1, 30, 8], 1):
            expected = model(part, past_key_values=plain).logits
            assert torch.allclose(model(part, past_key_values=store).logits, expected, atol=1e-5)
    assert store.get_seq_length() == 90
    assert cache_bytes(store) == cache_bytes(plain)
    for name, arguments in (
        ("crop", (-3,)), ("batch_repeat_interleave", (2,)), ("batch_select_indices", (torch.tensor([3, 1, 0]),)),
        ("reorder_cache", (torch.tensor([2, 0, 1]),)),
    ):  # fmt: skip
        for cache in (plain, store):
            getattr(cache, name)(*arguments)
        for mine, theirs in zip(store.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys), name
            assert torch.equal(mine.values, theirs.values), name
    store.reset()
    assert store.get_seq_length() == 0


def test_beams_with_a_store(tiny_llama: Callable[..., hf.LlamaForCausalLM]) -> None:
    model = tiny_llama()
    how = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    ids = torch.arange(3, 20)[None]
    found = model.generate(ids, past_key_values=StoreCache(model.config), **how)
    assert torch.equal(found, model.generate(ids, **how))


@native
def test_a_decoder_refuses_what_does_not_fit() -> None:
    shape, table = DecoderShape(32, 4, 2, 8, 1e-5), torch.zeros(20, 32)
    rest: dict[str, Any] = {"logits": table, "gain": torch.ones(32), "blocks": [], "activations": "float"}
    for wrong in (
        DecoderShape(31, 4, 2, 8, 1e-5),
        DecoderShape(32, 4, 3, 8, 1e-5),
        DecoderShape(32, 4, 2, 7, 1e-5),
    ):
        with pytest.raises(KernelError):
            NativeDecoder(wrong, embedding=table, **rest)
    for wrong_table in (table[:, 1:], table[0], table.double(), table.long()):
        with pytest.raises(KernelError):
            NativeDecoder(shape, embedding=wrong_table, **rest)
    decoder = NativeDecoder(shape, embedding=table, **rest)
    good = {
        "store": torch.zeros(0, 2, 3, 2, 16, 8), "held": 4, "tokens": torch.tensor([0, 19, 5]), "pads": torch.zeros(3).long(),
        "cosines": torch.zeros(16, 8), "sines": torch.zeros(16, 8),
    }  # fmt: skip
    assert decoder.advance(**good).shape == (3, 20)
    wrongs: list[tuple[str, Any]] = [
        ("store", torch.zeros(1, 2, 3, 2, 16, 8)), ("store", torch.zeros(0, 2, 3, 2, 16, 9)), ("store", torch.zeros(0, 2)),
        ("held", 16), ("held", -1), ("held", 2**62), ("tokens", torch.tensor([0, 20, 5])), ("tokens", torch.tensor([0, -1, 5])),
        ("tokens", torch.tensor([1, 2])), ("tokens", torch.tensor([1, 2, 3]).int()), ("pads", torch.tensor([0, 5, 0])),
        ("pads", torch.zeros(3)), ("cosines", torch.zeros(15, 8)), ("sines", torch.zeros(16, 8).half()),
    ]  # fmt: skip
    for field, value in wrongs:
        with pytest.raises(KernelError):
            decoder.advance(**good | {field: value})
