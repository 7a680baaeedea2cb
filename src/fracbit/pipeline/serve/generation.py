"""Serving: streams text from prompts and measures the speed. `fracbit generate` and `fracbit chat` print both.

transformers' `generate` runs the model; a streamer takes the tokens and the times. The first token marks the end of
prefill, which reads long prompts in chunks so that activations stay small. If the model has a native decode step
(`fracbit.models.step`), it replaces transformers' loop inside the same `generate`; `Generation.step` names the one
used.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from fracbit.errors import DataError
from fracbit.kernels import Activations, choose
from fracbit.models.cache import PackedCache, cache_bytes
from fracbit.models.packed_store import PackedStore
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear
from fracbit.models.step import Decoder, obstacle
from fracbit.models.store_cache import StoreCache
from fracbit.records.generating import Settings

Show = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """The result: `texts` of new tokens, one per prompt; speeds in tokens per second over the whole batch."""

    texts: tuple[str, ...]
    whole: tuple[
        str, ...
    ]  # prompt and continuation, decoded together so that the spaces between them are right
    ids: tuple[tuple[int, ...], ...]  # prompts and new tokens, padding included
    prompt_tokens: int
    new_tokens: int
    seconds: float
    prefill: float
    decode: float
    cache_bytes: int
    step: str  # how a token was made


class _Clock(BaseStreamer):  # type: ignore[no-untyped-call, unused-ignore]
    """Records the time of every step, and passes tokens to a `TextStreamer` if there is one prompt."""

    def __init__(self, text: TextStreamer | None) -> None:
        self.text = text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        if self.text is not None:
            self.text.end()


class _Shown(TextStreamer):
    """A `TextStreamer` that hands text to a function instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show, prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=not prompt, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def choose_activations(model: PreTrainedModel, activations: Activations) -> None:
    """Set every packed layer to exact (`"float"`) or 8-bit (`"int8"`) activations."""
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            module.choose(activations)


@dataclass(frozen=True)
class Step:
    """How a model makes a token: by the native step of `decoder`, or, without one, layer by layer. `name` says why."""

    decoder: Decoder | None
    name: str


NATIVE_STEP = "native step"


def step_of(model: PreTrainedModel) -> Step:
    """The fastest way for this model. Choose activations first."""
    reason = obstacle(model)
    if reason is None:
        return Step(Decoder(model), NATIVE_STEP)
    exact = "; activations stay exact: no kernel here rounds them" if _stays_exact(model) else ""
    return Step(None, f"layer by layer: {reason}{exact}")


def _stays_exact(model: PreTrainedModel) -> bool:
    """Whether a packed layer has a type of activations that its kernel does not support."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return any(
        layer.activations not in choose(layer.scheme, model.device, layer.shape).paths for layer in layers
    )


def new_cache(model: PreTrainedModel, kv_bits: int, step: Step | None = None, room: int = 0) -> Cache:
    """An empty KV cache for `model`: 16 bits is the model's own type, 8 and 4 are packed.

    A native step needs a cache in one piece, with space for `room` tokens at first.
    """
    if step is not None and step.decoder:
        return StoreCache(model.config, room) if kv_bits == 16 else PackedStore(model.config, kv_bits)
    return DynamicCache(config=model.config) if kv_bits == 16 else PackedCache(model.config, kv_bits)


def encode_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [prompts, tokens], shorter prompts padded on the left. Raises `DataError` for an empty one."""
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if not rows or not all(rows):
        raise DataError("a prompt has no tokens; give every prompt at least one character")
    return pad_left(rows, padding(tokenizer))


def pad_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that pads short rows; it is masked, so it is 0 if the tokenizer names none."""
    for name in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if name is not None:
            return int(name)
    return 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Settings,
    show: Show | None = None,
) -> Generation:
    """Continue `prompts` as one batch; for a single prompt, `show` gets it and then its continuation piece by piece.

    Raises `DataError` for an empty prompt or one that is too long for the model's positions.
    """
    ids, mask = encode_batch(tokenizer, prompts)  # [prompts, tokens] each
    step = step_of(model)
    cache = new_cache(model, settings.kv_bits, step, ids.shape[1] + settings.max_new_tokens)
    return continue_ids(
        model,
        tokenizer,
        ids=ids,
        mask=mask,
        settings=settings,
        cache=cache,
        step=step,
        show=show,
        show_prompt=True,
    )


def continue_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    settings: Settings,
    cache: Cache,
    step: Step,
    show: Show | None = None,
    show_prompt: bool = False,
) -> Generation:
    """Continue `ids` [prompts, tokens]; `cache` already holds the first ones. `show` can also get the prompt."""
    held = cache.get_seq_length()
    check_room(model, ids.shape[1], settings.max_new_tokens)
    clock = _Clock(_Shown(tokenizer, show, show_prompt) if show is not None and len(ids) == 1 else None)
    how: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        how = {"do_sample": True, "temperature": settings.temperature}
    if step.decoder is not None:
        how["custom_generate"] = _decoding(
            step.decoder, mask, clock=clock, chunk=settings.prefill_chunk, filler=padding(tokenizer)
        )
    started = time.perf_counter()
    found = model.generate(  # type: ignore[operator]
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        max_new_tokens=settings.max_new_tokens,
        prefill_chunk_size=settings.prefill_chunk if ids.shape[1] - held > settings.prefill_chunk else None,
        pad_token_id=padding(tokenizer),
        streamer=clock,
        **how,
    )
    seconds = time.perf_counter() - started
    new = found[:, ids.shape[1] :]  # [prompts, new tokens]
    first, last, steps = clock.times[1], clock.times[-1], new.shape[1] - 1
    return Generation(
        texts=tuple(tokenizer.batch_decode(new, skip_special_tokens=True)),
        whole=tuple(tokenizer.batch_decode(found, skip_special_tokens=True)),
        ids=tuple(tuple(row) for row in found.tolist()),
        prompt_tokens=int(mask.sum()),
        new_tokens=new.numel(),
        seconds=seconds,
        prefill=len(ids) * (ids.shape[1] - held) / (first - started),
        decode=len(ids) * steps / (last - first) if steps else 0.0,
        cache_bytes=cache_bytes(cache),
        step=step.name,
    )


def _decoding(
    decoder: Decoder, mask: Tensor, clock: _Clock, chunk: int, filler: int
) -> Callable[..., Tensor]:
    """A decoding method for transformers' `generate`, with its processors and stopping criteria and our step.

    `generate` gives a custom method neither the streamer nor the chunk, and drops a mask of ones, so they come from
    here. It takes the names of further parameters for options, so the cache comes in `held`.
    """

    def decode(
        model: PreTrainedModel, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: GenerationConfig, **held: Any,
    ) -> Tensor:  # fmt: skip
        cache, pads = held["past_key_values"], (mask == 0).sum(1)
        going = torch.ones(len(input_ids), dtype=torch.bool)  # [prompts]
        logits = read_prompt(model, input_ids, mask=mask, cache=cache, chunk=chunk)  # [prompts, vocabulary]
        while True:
            scores = logits_processor(input_ids, logits)
            following = scores.argmax(-1)  # [prompts]
            if generation_config.do_sample:
                following = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            following = following.masked_fill(~going, filler)
            input_ids = torch.cat([input_ids, following[:, None]], 1)  # [prompts, tokens]
            clock.put(following)
            going = going & ~stopping_criteria(input_ids, None)
            if not going.any():
                break
            logits = decoder.advance(following, pads, cache)
        clock.end()
        return input_ids

    return decode


def read_prompt(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, chunk: int) -> Tensor:
    """Run the model over the `ids` [prompts, tokens] that `cache` does not hold; fp32 logits [prompts, vocabulary]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [prompts, tokens]
    takes = inspect.signature(model.forward).parameters
    for begin in range(int(cache.get_seq_length()), ids.shape[1], chunk):
        part = slice(begin, begin + chunk)
        more = {"position_ids": positions[:, part], "logits_to_keep": 1}
        state = model(
            input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True,
            **{name: value for name, value in more.items() if name in takes},
        )  # fmt: skip
    logits: Tensor = state.logits[:, -1].float()  # [prompts, vocabulary]
    return logits


def check_room(model: PreTrainedModel, tokens: int, new_tokens: int) -> None:
    """Raises `DataError` when `model` has too few positions for a prompt of `tokens` and `new_tokens` after it."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and tokens + new_tokens > limit:
        raise DataError(
            f"{tokens} tokens of prompt and {new_tokens} new ones are more than the model's {limit} "
            "positions; shorten the prompt, begin a new conversation or ask for fewer new tokens"
        )


class Chat:
    """A conversation. It keeps the messages, and the cache of the tokens read as long as the template only appends."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> None:
        """Raises `DataError` when the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise DataError(
                "this model's tokenizer has no chat template, so it was not trained to chat; use `fracbit generate`"
            )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.messages: list[dict[str, str]] = []
        self.read: list[int] = []
        self.step = step_of(model)
        self.cache = new_cache(model, settings.kv_bits, self.step)

    def say(self, text: str, show: Show | None = None) -> Generation:
        """Answer the user's `text`; both stay in the history."""
        messages = [*self.messages, {"role": "user", "content": text}]
        words = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = list(self.tokenizer(words, add_special_tokens=False)["input_ids"])
        held = self.cache.get_seq_length()
        if ids[:held] != self.read[:held] or held >= len(ids):
            self.cache = new_cache(self.model, self.settings.kv_bits, self.step)
        row, mask = pad_left([ids], 0)  # [1, tokens] each
        found = continue_ids(
            self.model,
            self.tokenizer,
            ids=row,
            mask=mask,
            settings=self.settings,
            cache=self.cache,
            step=self.step,
            show=show,
        )
        self.messages = [*messages, {"role": "assistant", "content": found.texts[0]}]
        self.read = list(found.ids[0])
        return found
