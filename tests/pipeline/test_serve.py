"""The KV cache of 8 and 4 bits, batches, long prompts and chat: same tokens as transformers, measured bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache

from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.errors import DataError, SchemeError
from fracbit.kernels import cpu
from fracbit.kernels.cpu import NATIVE, NOTE
from fracbit.models import step_compiler
from fracbit.models.cache import CHANNEL, TOKEN, PackedCache, cache_bytes, restore_states, round_states
from fracbit.models.quant_linear import QuantLinear
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.pipeline.serve.generation import (
    NATIVE_STEP,
    Chat,
    Settings,
    Step,
    choose_activations,
    continue_ids,
    encode_batch,
    generate,
    new_cache,
    step_of,
)
from fracbit.pipeline.serve.speed import Load, bytes_read, measure
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tales(shared: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(shared / "models" / "tales-m"), load_tokenizer(shared / "models" / "tales-m")


@pytest.fixture(scope="module")
def small_tales(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """tales-m at 4 bits, its tied table at 8; in fp32, where greedy choices do not hang on rounding."""
    folder = tmp_path_factory.mktemp("small") / "tales-m"
    recipe = Recipe(
        model=str(shared / "models" / "tales-m"), scheme=Scheme("int", 4, 64), head=Scheme("int", 8, 64)
    )
    write_checkpoint(recipe, folder)
    return load(folder, "float32"), load_tokenizer(folder), folder


def tale(shared: Path, tokens: int) -> torch.Tensor:
    import numpy as np

    ids = np.fromfile(shared / "data" / "tales-evaluation.u16", dtype=np.uint16, count=tokens)
    return torch.from_numpy(ids.astype(np.int64))[None]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shared_dim", [CHANNEL, TOKEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_within_half_a_step(bits: int, shared_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_states(x, bits, shared_dim)
    error = (restore_states(rounded, bits, torch.float32) - x.float().flatten(2, 3)).abs().max()
    rough = 2 ** -(11 if dtype == torch.float32 else 8) * float(x.abs().max()) * 3  # ranges have 16 bits
    assert error <= rounded.step.float().max() / 2 + rough
    assert rounded.codes.shape[-1] == 16 * bits // 8


def test_a_constant_is_kept() -> None:
    x = torch.full((1, 1, 1, 4, 2), 3.0)
    assert torch.equal(restore_states(round_states(x, 4, TOKEN), 4, torch.float32), x.flatten(2, 3))


def test_within_the_window_nothing_changes(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, ids = tiny_llama(), torch.arange(3, 40)[None]
    with torch.no_grad():
        packed = model(ids, past_key_values=PackedCache(model.config, 4, window=64)).logits
        assert torch.equal(packed, model(ids).logits)


def test_token_by_token_with_a_packed_cache(
    tales: tuple[PreTrainedModel, PreTrainedTokenizerBase], shared: Path
) -> None:
    """Loss over real text, decoded in steps of 32 after codes exist: 8 bits cost next to nothing, 4 bits little."""
    model, ids = tales[0], tale(shared, 384)
    losses, sizes = {}, {}
    for bits in (16, 8, 4):
        cache = DynamicCache(config=model.config) if bits == 16 else PackedCache(model.config, bits, 32, 32)
        with torch.no_grad():
            logits = torch.cat(
                [model(part, past_key_values=cache).logits for part in ids.split(32, 1)], 1
            ).float()
        assert cache.get_seq_length() == 384
        losses[bits] = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        sizes[bits] = cache_bytes(cache)
    assert abs(losses[8] - losses[16]) < 0.005
    assert abs(losses[4] - losses[16]) < 0.1
    assert sizes[4] < 0.45 * sizes[16] < sizes[8] < 0.7 * sizes[16]


def test_cache_follows_the_batch(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    cache = PackedCache(model.config, 8, window=4, group=4)
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    first = cache.layers[0]
    old = [restore_states(part, 8, torch.float32) for part in first.rounded]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(restore_states(first.rounded[0], 8, torch.float32), old[0].flip(0))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert first.keys.shape[0] == 1
    assert cache.get_seq_length() == 20
    cache.crop(-2)
    assert cache.get_seq_length() == 18
    with pytest.raises(SchemeError, match="larger window"):
        cache.crop(-10)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_bits_that_are_not_there(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(SchemeError, match="8 or 4"):
        PackedCache(tiny_llama().config, 3)


def test_beams_with_a_packed_cache(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    cache = PackedCache(model.config, 8, window=4, group=4)
    found = model.generate(
        torch.arange(3, 20)[None], past_key_values=cache, num_beams=2, max_new_tokens=8, do_sample=False
    )
    assert found.shape[1] <= 25


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_chunks_and_batches_write_the_same(
    tales: tuple[PreTrainedModel, PreTrainedTokenizerBase], kv_bits: int
) -> None:
    model, tokenizer = tales
    prompts = ["Once upon a time there was a small bird who", "The dog"]
    settings = Settings(max_new_tokens=12, kv_bits=kv_bits)
    shown: list[str] = []
    alone = [generate(model, tokenizer, [prompt], settings, shown.append) for prompt in prompts]
    together = generate(model, tokenizer, prompts, settings)
    chunked = generate(
        model, tokenizer, prompts[:1], Settings(max_new_tokens=12, kv_bits=kv_bits, prefill_chunk=3)
    )
    whole = [tokenizer.decode(found.ids[0], skip_special_tokens=True) for found in alone]
    assert "".join(shown) == "".join(whole)
    assert chunked.texts == alone[0].texts
    assert together.texts == (alone[0].texts[0], alone[1].texts[0])
    assert alone[0].prefill > 0 and alone[0].decode > 0


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_native_step_writes_what_the_layers_write(
    small_tales: tuple[PreTrainedModel, PreTrainedTokenizerBase, Path], temperature: float
) -> None:
    """The same tokens, alone, in a batch of uneven prompts, in chunks and sampled; the streamed text is the whole text."""
    model, tokenizer, _ = small_tales
    prompts = ["Once upon a time there was a small bird who", "The dog"]
    settings = Settings(max_new_tokens=24, temperature=temperature, prefill_chunk=3)
    for chosen in (prompts[:1], prompts):
        texts, shown = [], []
        for step in (step_of(model), Step(None, "layer by layer")):
            torch.manual_seed(0)
            ids, mask = encode_batch(tokenizer, chosen)
            cache = new_cache(model, 16, step)
            found = continue_ids(model, tokenizer, ids, mask, settings, cache, step, shown.append, True)
            texts.append((found.ids, found.cache_bytes))
            assert found.step == step.name
            assert found.decode > 0
        assert texts[0] == texts[1]
        half = len(shown) // 2
        assert len(chosen) > 1 or "".join(shown[:half]) == "".join(shown[half:]) == found.whole[0]
    assert step_of(model).name == NATIVE_STEP


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
def test_the_native_step_ends_where_the_text_ends(
    small_tales: tuple[PreTrainedModel, PreTrainedTokenizerBase, Path],
) -> None:
    """A finished sequence is filled up while the others go on; `generate` stops when all have ended."""
    model, tokenizer, _ = small_tales
    settings = Settings(max_new_tokens=16)
    free = generate(model, tokenizer, ["The dog", "A bird"], settings)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = free.ids[0][-10]
    try:
        native = generate(model, tokenizer, ["The dog", "A bird"], settings)
        ids, mask = encode_batch(tokenizer, ["The dog", "A bird"])
        step = Step(None, "layer by layer")
        layers = continue_ids(model, tokenizer, ids, mask, settings, new_cache(model, 16, step), step)
    finally:
        model.generation_config.eos_token_id = before
    assert native.ids == layers.ids
    assert native.ids != free.ids


def test_a_prompt_needs_tokens_and_room(tales: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(DataError, match="positions"):
        generate(*tales, ["bird " * 600], Settings())
    for wrong in (
        {"max_new_tokens": 0},
        {"prefill_chunk": 0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
    ):
        with pytest.raises(DataError, match="at least"):
            Settings(**wrong)


@pytest.mark.parametrize("packed", [False, True])
def test_chat_keeps_its_cache(
    tales: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    small_tales: tuple[PreTrainedModel, PreTrainedTokenizerBase, Path],
    shared: Path,
    packed: bool,
) -> None:
    model = small_tales[0] if packed else tales[0]
    tokenizer = load_tokenizer(shared / "models" / "tales-m")
    with pytest.raises(DataError, match="no chat template"):
        Chat(model, tokenizer, Settings())
    tokenizer.chat_template = TEMPLATE
    talk = Chat(model, tokenizer, Settings(max_new_tokens=8))
    talk.say("Who is there?")
    talk.say("And who else?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    fresh = Chat(model, tokenizer, Settings(max_new_tokens=8))
    fresh.messages = talk.messages[:2]
    assert fresh.say("And who else?").texts[0] == talk.messages[3]["content"]


def test_bench_counts_what_a_step_reads(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    model = tiny_llama()
    everything = sum(part.numel() * 4 for part in model.parameters())
    rotary = sum(part.numel() * part.element_size() for part in model.buffers())
    assert bytes_read(model) == everything + rotary - model.model.embed_tokens.weight.numel() * 4
    model.save_pretrained(tmp_path)
    found = measure(str(tmp_path), Load(8, 4, 8))
    assert (
        found.cache_bytes_per_token == 2 * 3 * 2 * 12 * 12 * 4
    )  # two, layers, heads, head size, tokens, bytes
    assert found.bytes_per_token == found.weight_bytes_per_token + found.cache_bytes_per_token
    assert found.decode_tokens_per_second > 0 and found.bandwidth > 0
    assert found.step == (NATIVE_STEP if NATIVE is not None else f"layer by layer: {NOTE}")
    assert new_cache(model, 16).get_seq_length() == 0


def test_bench_refuses_more_tokens_than_positions(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="positions"):
        measure(str(tmp_path), Load(model.config.max_position_embeddings, 1))


def test_bench_refuses_before_it_loads() -> None:
    for words, error in (
        ({"new_tokens": 0}, DataError),
        ({"prompt_tokens": -1}, DataError),
        ({"kv_bits": 3}, SchemeError),
    ):
        with pytest.raises(error, match=r"at least 1|16 bits .* 8 or 4, got 3"):
            Load(**words)
    with pytest.raises(DataError, match="float or int8, got 'int3'"):
        measure("no such model", Load(), "int3")


def test_activations_that_no_kernel_rounds_are_said_to_stay_exact(
    small_tales: tuple[PreTrainedModel, PreTrainedTokenizerBase, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = small_tales
    reason = "the native module was not built"
    for module in (cpu, step_compiler):
        monkeypatch.setattr(module, "NATIVE", None)
    monkeypatch.setattr(step_compiler, "NOTE", reason)
    try:
        choose_activations(model, "int8")
        found = generate(model, tokenizer, ["The dog"], Settings(max_new_tokens=2))
        assert found.step == f"layer by layer: {reason}; activations stay exact: no kernel here rounds them"
        choose_activations(model, "float")
        assert step_of(model).name == f"layer by layer: {reason}"
    finally:
        choose_activations(model, "float")


def test_a_loaded_model_holds_the_bytes_of_its_file(
    small_tales: tuple[PreTrainedModel, PreTrainedTokenizerBase, Path],
) -> None:
    """Buffers and parameters are the file's bytes, before and after the kernels have been prepared."""
    model, tokenizer, folder = small_tales
    generate(model, tokenizer, ["The dog"], Settings(max_new_tokens=4))
    held = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for part in model.state_dict().values()
    }
    file = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0.95 * file < sum(held.values()) < file
    derived = sum(
        module.ready().prepared.weight.derived_bytes
        for module in model.modules()
        if NATIVE is not None and isinstance(module, QuantLinear)
    )
    assert derived < 0.05 * file
