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
from fracbit.models.cache import CHANNEL, TOKEN, PackedCache, cache_bytes, restore_states, round_states
from fracbit.pipeline.bench import Load, bytes_read, measure
from fracbit.pipeline.serve import Chat, Settings, generate, new_cache

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tales(shared: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(shared / "models" / "tales-m"), load_tokenizer(shared / "models" / "tales-m")


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


def test_a_prompt_needs_tokens_and_room(tales: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(DataError, match="positions"):
        generate(*tales, ["bird " * 600], Settings())
    with pytest.raises(DataError, match="at least 1"):
        Settings(max_new_tokens=0)


def test_chat_keeps_its_cache(tales: tuple[PreTrainedModel, PreTrainedTokenizerBase], shared: Path) -> None:
    model, tokenizer = tales[0], load_tokenizer(shared / "models" / "tales-m")
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
    assert new_cache(model, 16).get_seq_length() == 0
