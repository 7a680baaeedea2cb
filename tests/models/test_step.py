"""The native decode step computes what the model computes, token by token, for every type that has a blueprint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from families import CONFIGS, LLAMA_LIKE, UNKNOWN, Sizes, build, config_of
from fracbit.errors import KernelError, SchemeError
from fracbit.kernels import Elementwise, HeadSpans, InputRounding, NativeProgram, Older, Span, Tables
from fracbit.kernels.cpu import NATIVE
from fracbit.models.blocks import bias_of, blocks, linears, weight_of
from fracbit.models.blueprints import BLUEPRINTS, blueprint_of, covered_types
from fracbit.models.cache import PackedCache, cache_bytes
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of
from fracbit.models.install import replace as put
from fracbit.models.packed_store import PackedStore
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead
from fracbit.models.step import Decoder, obstacle
from fracbit.models.store_cache import StoreCache
from fracbit.numerics import quantize_tensor
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
ENDS = {"bos_token_id": None, "eos_token_id": None}
LONG = {"max_position_embeddings": 256}
SIZES = LLAMA_LIKE | ENDS | LONG
FALCON = CONFIGS["falcon-7b"][1]
MORE: Mapping[str, tuple[str, Sizes]] = {
    "rotation": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "wide heads": ("LlamaConfig", {"head_dim": 80, "num_key_value_heads": 4}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "ministral": ("MinistralConfig", {"sliding_window": 5}),
    "olmo": ("OlmoConfig", {}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5}),
    "starcoder2-sliding": ("Starcoder2Config", {"sliding_window": 5}),
    "qwen3_moe-shares": ("Qwen3MoeConfig", CONFIGS["qwen3_moe"][1] | {"norm_topk_prob": True}),
    "gemma3-capped": ("Gemma3TextConfig", CONFIGS["gemma3"][1] | {"final_logit_softcapping": 5.0}),
    "smollm3-sliding": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2}),
    "gpt2-by-layer": ("GPT2Config", CONFIGS["gpt2"][1] | {"scale_attn_by_inverse_layer_idx": True}),
    "falcon-alibi": ("FalconConfig", FALCON | {"alibi": True}),
    "falcon-many": ("FalconConfig", FALCON | {"multi_query": False}),
    "falcon-sequential": ("FalconConfig", FALCON | {"parallel_attn": False}),
    "opt-gelu": ("OPTConfig", CONFIGS["opt"][1] | {"activation_function": "gelu", "enable_bias": False}),
}  # fmt: skip
COVERED = {
    name: given for name, given in {**CONFIGS, **UNKNOWN}.items() if config_of(name).model_type in covered_types()
} | {name: (kind, LLAMA_LIKE | sizes if "Falcon" not in kind else sizes) for name, (kind, sizes) in MORE.items()}  # fmt: skip
"""Every blueprint, and the switches inside one that change what a step computes."""


def config(name: str, **changes: Any) -> hf.PreTrainedConfig:
    kind, sizes = COVERED[name]
    long = {"n_positions": 256} if kind == "GPT2Config" else LONG
    found: hf.PreTrainedConfig = getattr(hf, kind)(**(sizes | ENDS | {"pad_token_id": None} | long | changes))
    return found


def packed(module: nn.Module, scheme: Scheme) -> QuantLinear:
    bias = bias_of(module)
    layer = QuantLinear(scheme, tuple(weight_of(module).shape), bias=bias is not None)
    layer.fill(quantize_tensor(weight_of(module).float().contiguous(), scheme))
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


SCHEMES = (Scheme("nf", 4, 16), Scheme("int", 3, 32, offset="zero"))


def small(
    name: str, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model whose blocks are packed, but for one layer; a tied table of Llama is packed too."""
    model = build(config(name, **changes))
    split_experts(model)
    family = family_of(model)
    for number, (path, block) in enumerate(blocks(model, family)):
        for index, (linear, module) in enumerate(linears(block, family).items()):
            if (number, index) != (1, 1) and linear not in family.keep_float:
                put(model, f"{path}.{linear}", packed(module, scheme or SCHEMES[index % 2]))
    if name == "llama-tied-biased":
        table = model.get_input_embeddings().weight
        embedding = QuantEmbedding(Scheme("int", 8, 16), tuple(table.shape), dtype)
        embedding.fill(quantize_tensor(table.detach().float(), embedding.scheme))
        model.model.embed_tokens, model.lm_head = embedding, TiedHead(embedding)
    return model.to(dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def whole(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    """The model's own logits [batch, tokens, vocabulary]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = positions
    found: torch.Tensor = model(
        ids, attention_mask=mask, use_cache=bool(more.get("past_key_values")), **more
    ).logits
    return found.float()


def both(
    model: PreTrainedModel, batch: int = 1, pad: int = 0, prompt: int = 7, tokens: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [batch, tokens, vocabulary] of the native step and of the model; the first sequence has `pad` masked tokens."""
    ids = torch.randint(3, 60, (batch, prompt + tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    with torch.no_grad():
        expected = whole(model, ids, mask)[:, prompt:]
        cache, decoder = StoreCache(model.config), Decoder(model)
        whole(model, ids[:, :prompt], mask[:, :prompt], past_key_values=cache)
        steps = [decoder.advance(ids[:, prompt + i], (mask == 0).sum(1), cache) for i in range(tokens)]
    return torch.stack(steps, 1), expected


def choose_int8(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            module.choose("int8")


def test_every_blueprint_is_tried() -> None:
    tried = {id(blueprint_of(config(name))) for name in COVERED}
    missing = [one for one in BLUEPRINTS if id(one) not in tried and one.model_types != ("falcon",)]
    assert not missing
    assert {config(name).model_type for name in COVERED} == set(covered_types())


@native
@pytest.mark.parametrize("name", COVERED)
def test_a_step_is_the_models_own(name: str) -> None:
    """Packed and as floats, alone and in a batch whose first sequence is padded."""
    plain = build(config(name))
    if name == "gpt_oss":
        split_experts(plain)
    assert distance(*both(plain, 3, 3)) < 1e-5
    model = small(name)
    assert distance(*both(model)) < 1e-5
    choose_int8(model)
    assert distance(*both(model)) < 2e-2


@native
@pytest.mark.parametrize("name", COVERED)
def test_greedy_tokens_over_two_hundred_steps(name: str) -> None:
    """What the model would say after each of the tokens that the step says: the same, but for near ties."""
    model, prompt, steps = small(name), 7, 200
    ids = torch.randint(3, 60, (1, prompt), generator=torch.Generator().manual_seed(2))
    cache, decoder, pads = StoreCache(model.config), Decoder(model), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        logits = whole(model, ids, torch.ones_like(ids), past_key_values=cache)[:, -1]
        for _ in range(steps):
            ids = torch.cat([ids, logits.argmax(-1)[None]], 1)
            logits = decoder.advance(ids[:, -1], pads, cache)
        expected = whole(model, ids, torch.ones_like(ids))[0, prompt - 1 : -1]  # [steps, vocabulary]
    said = expected.gather(1, ids[0, prompt:, None])[:, 0]
    behind = (expected.amax(1) - said) / expected.std(1)
    assert float(behind.max()) < 1e-4  # of the spread of the logits: a near tie


INPUTS = [
    None, Inputs("int", 8, "token"), Inputs("int", 8, "tensor", 3.0), Inputs("int", 4, "16"), Inputs("power", 8),
    Inputs("nf", 5), Inputs("float", 6, "20"),
]  # fmt: skip


@native
@pytest.mark.parametrize("rotated", [False, True], ids=["as they are", "rotated"])
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_inputs_that_the_recipe_rounds_or_rotates(inputs: Inputs | None, rotated: bool) -> None:
    """Some layers of those that read one register, so that these differ; a rounding near a tie may go the other way."""
    model = small("llama", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    plain = both(model, 2, 3)[0]
    for index, module in enumerate(one for one in model.modules() if isinstance(one, QuantLinear)):
        if index % 3:
            module.inputs, module.rotated = inputs, rotated
    found, expected = both(model, 2, 3)
    assert distance(found, expected) < (1e-5 if inputs is None else 5e-3)
    assert (distance(found, plain) > 1e-3) == (inputs is not None or rotated)


@native
def test_a_number_that_is_none_stays_one() -> None:
    made = NativeProgram(4, "float")
    x = made.register(4)
    made.embed(torch.tensor([[1.0, float("nan"), 2.0, 0.0], [4.0, 3.0, -2.0, float("inf")]]), x, 1.0)
    values = torch.linspace(-1, 1, 15)
    made.round(x, x, InputRounding(values, (values[1:] + values[:-1]) / 2, 0.0, 1.0, group=2, scale=0.0))
    made.add(x, Span(0, 0, 4), keep=0.0)
    store, pads = torch.zeros(0, 2, 2, 0, 4, 0), torch.zeros(2).long()
    logits = made.advance(store, 1, torch.tensor([0, 1]), pads, tables=Tables())
    assert (~logits.isfinite()).tolist() == [[True, True, False, False], [False, False, True, True]]


OTHERS = [Scheme("int", 4, 16, "out"), Scheme("int", 8, "row"), Scheme("kmeans:row", 2, 20)]


@native
@pytest.mark.parametrize("scheme", OTHERS, ids=str)
def test_any_scheme_takes_the_step(scheme: Scheme) -> None:
    assert distance(*both(small("llama", scheme), 2)) < 1e-5


@native
def test_any_number_of_threads_gives_the_same() -> None:
    before = torch.get_num_threads()
    model = small("qwen3", hidden_size=256, intermediate_size=2048)
    ids, pads = torch.arange(3, 43)[None], torch.zeros(1, dtype=torch.long)
    cache, decoder = StoreCache(model.config), Decoder(model)
    found = []
    try:
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(torch.stack([decoder.advance(ids[:, i], pads, cache) for i in range(8, 40)]))
                cache.crop(-32)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@native
def test_eight_bit_activations_and_sixteen_bit_models() -> None:
    model = small("llama")
    exact = both(model)[1]
    choose_int8(model)
    found, expected = both(model)
    assert 1e-4 < distance(found, exact) < 3e-2
    assert distance(found, expected) < 2e-2
    for name in ("llama", "gemma3", "gpt2", "mixtral"):
        assert distance(*both(small(name, dtype=torch.bfloat16))) < 3e-2


@native
def test_the_store_grows_and_keeps_what_it_held() -> None:
    assert distance(*both(small("qwen3"), 1, 0, 60, 10)) < 1e-5  # it begins with room for 64


def llama(**changes: Any) -> hf.PreTrainedConfig:
    return hf.LlamaConfig(**SIZES | {"pad_token_id": None} | changes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (hf.GPTJConfig(n_embd=40, n_layer=2, n_head=4, rotary_dim=4, vocab_size=67), "gptj"),
        (llama(hidden_act="mish"), "Mish"),
        (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (hf.OlmoConfig(**SIZES | {"clip_qkv": 2.0, "pad_token_id": None}), "clip_qkv"),
        (hf.GptOssConfig(**SIZES | {"num_local_experts": 5, "pad_token_id": None}), "transposed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@native
def test_what_stands_in_the_way_is_named(given: hf.PreTrainedConfig, words: str) -> None:
    model = build(given)
    assert words in str(obstacle(model))
    with pytest.raises(KernelError, match=words):
        Decoder(model)


@native
def test_layers_that_stand_in_the_way() -> None:
    assert obstacle(build(config("llama"))) is None
    model = small("llama")
    assert obstacle(model) is None
    first = model.model.layers[0]
    first.mlp.up_proj.choose("int8")
    assert "differ" in str(obstacle(model))
    first.mlp.up_proj.choose("float")
    first.mlp.up_proj.inputs = Inputs("int", 8, "tensor")
    assert "no scale yet" in str(obstacle(model))
    first.mlp.up_proj.inputs = Inputs("int", 8, "tensor", scale=0.0)
    assert "static scale 0" in str(obstacle(model))
    first.mlp.up_proj.inputs = None
    mixture = small("mixtral")
    assert obstacle(mixture) is None
    next(iter(mixture.model.layers[0].mlp.experts.children())).down_proj.rotated = True
    assert "experts read" in str(obstacle(mixture))
    first.self_attn.q_proj = nn.Sequential(first.self_attn.q_proj)
    assert "self_attn.q_proj is a Sequential" in str(obstacle(model))
    assert "computes in torch.float64" in str(obstacle(model.double()))


@native
def test_a_model_that_was_changed_is_refused() -> None:
    model = small("llama")
    decoder, cache = Decoder(model), StoreCache(model.config)
    ids, pads = torch.arange(3, 9)[None], torch.zeros(1, dtype=torch.long)
    with pytest.raises(KernelError, match="cache is empty"):
        decoder.advance(ids[:, 0], pads, cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        decoder.advance(ids[:, 0], pads, cache)
        model.model.norm.weight.mul_(2)
    with pytest.raises(KernelError, match="changed after its decode step was made"):
        decoder.advance(ids[:, 0], pads, cache)


@native
@pytest.mark.parametrize(
    "change",
    [choose_int8, lambda model: model.to(torch.bfloat16), lambda model: model.model.layers[1].mlp.down_proj.choose("int8"),
     lambda model: setattr(model.model.layers[1].mlp.down_proj, "inputs", Inputs("int", 2, "token")),
     lambda model: setattr(model.model.layers[1].mlp.down_proj, "rotated", True)],
)  # fmt: skip
def test_other_changes_are_refused_too(change: Callable[[PreTrainedModel], Any]) -> None:
    model = small("llama")
    decoder, cache = Decoder(model), StoreCache(model.config)
    with torch.no_grad():
        model(torch.arange(3, 9)[None], past_key_values=cache)
    change(model)
    with pytest.raises(KernelError, match="changed after its decode step was made"):
        decoder.advance(torch.tensor([3]), torch.zeros(1, dtype=torch.long), cache)


@pytest.mark.parametrize("room", [2**42, 2**62])
def test_a_cache_that_no_memory_holds(tiny_llama: Callable[..., hf.LlamaForCausalLM], room: int) -> None:
    model = tiny_llama()
    cache = StoreCache(model.config, room)
    with torch.no_grad(), pytest.raises(KernelError, match=f"a KV cache for {room} tokens takes .* GB"):
        model(torch.arange(3, 9)[None], past_key_values=cache)
    assert cache.get_seq_length() == 0


@native
def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = build(config("gpt2", n_positions=9))
    decoder, cache, pads = Decoder(model), StoreCache(model.config), torch.zeros(1, dtype=torch.long)
    token = torch.tensor([3])
    with torch.no_grad():
        model(torch.arange(3, 11)[None], past_key_values=cache)
    decoder.advance(token, pads, cache)
    with pytest.raises(KernelError, match="no position 9"):
        decoder.advance(token, pads, cache)


@native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", COVERED)
def test_a_packed_cache_takes_the_step(name: str, bits: int) -> None:
    """A step finds in the codes what the model itself finds there; the window moves while it runs."""
    model = small(name)
    ids = torch.randint(3, 60, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    caches = [PackedStore(model.config, bits, 8, 8) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            whole(model, ids[:, :30], mask[:, :30], past_key_values=cache)
        decoder = Decoder(model)
        for i in range(30, 60):
            found = decoder.advance(ids[:, i], (mask == 0).sum(1), caches[0])
            expected = whole(model, ids[:, i : i + 1], mask[:, : i + 1], past_key_values=caches[1])[:, -1]
            assert distance(found, expected) < 1e-3, i  # a code near a tie
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 60
    assert caches[0].held < 16
    assert cache_bytes(caches[0]) == cache_bytes(caches[1])


def test_a_packed_store_is_a_packed_cache(tiny_llama: Callable[..., hf.LlamaForCausalLM]) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 90, (2, 90), generator=torch.Generator().manual_seed(0))
    plain, store = PackedCache(model.config, 8, 0, 16), PackedStore(model.config, 8, 0, 16)
    with torch.no_grad():
        for part in ids.split([50, 1, 13, 18, 8], 1):
            expected = model(part, past_key_values=plain).logits
            assert torch.allclose(model(part, past_key_values=store).logits, expected, atol=1e-5)
    assert store.get_seq_length() == plain.get_seq_length() == 90
    assert cache_bytes(store) == cache_bytes(plain)
    for name, argument in (
        ("crop", -3), ("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([3, 1, 0])),
        ("reorder_cache", torch.tensor([2, 0, 1])),
    ):  # fmt: skip
        for cache in (plain, store):
            getattr(cache, name)(argument)
        for mine, theirs in zip(store.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys), name
            assert torch.equal(mine.rounded[1].codes, theirs.rounded[1].codes), name
    with pytest.raises(SchemeError, match="cannot be removed from a packed cache"):
        store.crop(-20)
    store.reset()
    assert store.get_seq_length() == 0
    with pytest.raises(SchemeError, match="8 or 4 bits"):
        PackedStore(model.config, 3)


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


def heads(span: Span, count: int) -> HeadSpans:
    size = span.width // count
    return HeadSpans(span.register, span.offset, count, size, count, size, 0)


def program() -> tuple[NativeProgram, Span, Span]:
    """A step of one attention: 4 heads of 8 numbers on 2 key heads, a vocabulary of 20. Its stream and its keys."""
    made = NativeProgram(20, "float")
    x, k = made.register(32), made.register(16)
    made.embed(torch.ones(20, 32), x, 1.0)
    made.multiply([(torch.ones(16, 32), None)], x, [k])
    made.turn(heads(k, 2), 0, 8)
    made.attend((heads(x, 4), heads(k, 2), heads(k, 2)), x, 1.0)
    made.multiply([(torch.ones(20, 32), None)], x, [Span(0, 0, 20)])
    return made, x, k


@native
def test_a_program_refuses_operations_that_do_not_fit() -> None:
    made, x, k = program()
    square, row = (torch.ones(32, 32), None), torch.ones(32)
    wrongs: list[Callable[[], Any]] = [
        lambda: made.register(0), lambda: made.embed(torch.ones(20, 33), x, 1.0), lambda: made.embed(row, x, 1.0),
        lambda: made.embed(torch.ones(20, 32).double(), x, 1.0), lambda: made.embed(torch.ones(20, 32).long(), x, 1.0),
        lambda: made.add_positions(torch.ones(20, 32), x, 21), lambda: made.multiply([square], k, [x]),
        lambda: made.multiply([square], x, [k]), lambda: made.multiply([], x, []), lambda: made.multiply([square], x, [x, x]),
        lambda: made.multiply([(square[0], torch.ones(31))], x, [x]), lambda: made.multiply([square], Span(9, 0, 32), [x]),
        lambda: made.multiply([square], Span(x.register, 1, 32), [x]),
        lambda: made.normalize(heads(x, 1), heads(x, 1), torch.ones(31), None, 1e-5, False),
        lambda: made.normalize(heads(x, 1), heads(x, 2), None, None, 1e-5, False),
        lambda: made.turn(heads(k, 2), 0, 7), lambda: made.turn(heads(k, 2), 0, 10), lambda: made.turn(heads(k, 2), -1, 8),
        lambda: made.turn(replace(heads(k, 2), offset=1), 0, 8), lambda: made.turn(replace(heads(k, 2), step=-8), 0, 8),
        lambda: made.attend((heads(x, 4), heads(k, 1), heads(k, 2)), x, 1.0),
        lambda: made.attend((heads(x, 4), heads(k, 1), heads(k, 1)), x, 1.0),
        lambda: made.attend((heads(x, 4), heads(k, 2), heads(k, 2)), k, 1.0),
        lambda: made.spread(x, x, [torch.ones(64, 64)]), lambda: made.spread(x, x, [torch.ones(4, 8)]),
        lambda: made.spread(x, k, []), lambda: made.spread(x, x, [torch.ones(2**13, 1), torch.ones(2**13, 2**13)]),
        lambda: made.round(x, x, InputRounding(row, row, 0.0, 1.0, 0, 0.0)),
        lambda: made.round(x, x, InputRounding(row, row[1:], 0.0, 0.0, 0, 0.0)),
        lambda: made.round(x, x, InputRounding(row, row[1:], -1.0, 1.0, 0, 0.0)),
        lambda: made.round(x, x, InputRounding(row, row[1:], 1.0, 1.0, -1, 0.0)),
        lambda: made.activate(x, Elementwise("tan")),  # type: ignore[arg-type]
        lambda: made.gate(x, k, Elementwise("silu")), lambda: made.add(k, x), lambda: made.route(k, 17, True),
        lambda: made.run_experts([[square]], x, [x], False), lambda: made.mix(x, k),
    ]  # fmt: skip
    for number, wrong in enumerate(wrongs):
        with pytest.raises(KernelError):
            pytest.fail(f"{number}: {wrong()}")


@native
def test_a_step_refuses_what_does_not_fit() -> None:
    made, _, _ = program()
    turns = (torch.ones(16, 8), torch.zeros(16, 8))
    good: dict[str, Any] = {
        "store": torch.zeros(1, 2, 3, 2, 16, 8), "held": 4, "tokens": torch.tensor([0, 19, 5]), "pads": torch.zeros(3).long(),
        "tables": Tables([turns]),
    }  # fmt: skip
    keys, values = torch.ones(1, 3, 2, 5, 1, 8), torch.ones(1, 3, 2, 5, 2, 1)
    numbers = torch.zeros(1, 3, 2, 5, 2, 8, dtype=torch.uint8)
    codes = [numbers, keys, keys, numbers, values, values]
    assert made.advance(**good).shape == (3, 20)
    assert made.advance(**good | {"older": Older(8, codes)}).shape == (3, 20)
    wrongs: list[tuple[str, Any]] = [
        ("store", torch.zeros(2, 2, 3, 2, 16, 8)), ("store", torch.zeros(1, 2, 3, 2, 16, 9)), ("store", torch.zeros(1, 2)),
        ("held", 16), ("held", -1), ("held", 2**62), ("tokens", torch.tensor([0, 20, 5])), ("tokens", torch.tensor([0, -1, 5])),
        ("tokens", torch.tensor([1, 2])), ("tokens", torch.tensor([1, 2, 3]).int()), ("pads", torch.tensor([0, 5, 0])),
        ("pads", torch.zeros(3)), ("tables", Tables()), ("tables", Tables([turns], [torch.zeros(4, 16)])),
        ("tables", Tables([(turns[0][1:], turns[1])])), ("tables", Tables([(turns[0][:4], turns[1][:4])])),
        ("older", Older(8, codes[:5])), ("older", Older(5, codes)), ("older", Older(4, codes)),
        ("older", Older(8, [codes[0].int(), *codes[1:]])), ("older", Older(8, [*codes[:2], codes[2].half(), *codes[3:]])),
        ("older", Older(8, [*codes[3:], *codes[:3]])), ("tables", Tables([(turns[0], turns[1].half())])),
    ]  # fmt: skip
    for field, value in wrongs:
        with pytest.raises(KernelError):
            made.advance(**good | {field: value})
