"""What `fracbit bench` measures: speed of prefill and decode, the bytes that a step reads, and resident memory.

    bytes per token = weights read + KV cache read         (embeddings are looked up: one row, unless they are the head too)
    share = decode tokens/s x bytes per token / bandwidth   (bandwidth: a plain read of as many bytes, the best of several)

Decode is memory bound at batch 1, so a share of 1 would be the machine's limit. Warm-up is not counted: neither the
first reading of the prompt nor the first step. Both speeds are from medians.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from fracbit.checkpoint.load import load
from fracbit.checkpoint.opened import open_checkpoint
from fracbit.errors import DataError
from fracbit.kernels import Activations
from fracbit.models.blocks import is_table
from fracbit.models.cache import cache_bytes
from fracbit.models.quant_linear import QuantEmbedding, TiedHead
from fracbit.models.store_cache import StoreCache
from fracbit.pipeline.serve.generation import Step, check_room, choose_activations, new_cache, step_of
from fracbit.records.generating import PREFILL_CHUNK, Load, Speed

READS = 7
PROMPTS = 3  # readings of the prompt that count
LARGEST_READ = 1 << 30  # more bytes than any cache holds; a larger buffer reads no slower


@dataclass(frozen=True)
class Measured:
    """One model on this machine; bytes, tokens per second, bytes per second. `resident_bytes` is None where unknown."""

    model: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes_per_token: int
    cache_bytes_per_token: int
    bytes_per_token: int
    bandwidth: float
    bandwidth_share: float
    resident_bytes: int | None
    file_bytes: int
    threads: int
    step: str

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def measure(
    model: str,
    load_: Load,
    activations: str = "float",
    dtype: str = "auto",
    device: str = "cpu",
    trust: bool = False,
) -> Measured:
    """Load `model`, run `load_`, and measure the bandwidth of reading as many bytes. The model is freed afterwards.

    Raises `DataError` when the model has fewer positions than `load_` has tokens.
    """
    path = activations_of(activations)
    gc.collect()
    before = resident()
    loaded = load(model, dtype, device, trust)
    check_room(loaded, load_.prompt_tokens, load_.new_tokens)
    choose_activations(loaded, path)
    ids = prompt_of(loaded, load_.prompt_tokens)
    speed, cache, step = speed_of(loaded, ids.to(device), load_.new_tokens, load_.kv_bits)
    gc.collect()
    after, kept = resident(), cache_bytes(cache)
    weights = bytes_read(loaded)
    speed_of_reading = bandwidth(weights + kept, device)
    return Measured(
        model=model,
        prefill_tokens_per_second=speed.prefill,
        decode_tokens_per_second=speed.decode,
        weight_bytes_per_token=weights,
        cache_bytes_per_token=kept,
        bytes_per_token=weights + kept,
        bandwidth=speed_of_reading,
        bandwidth_share=speed.decode * (weights + kept) / speed_of_reading,
        resident_bytes=None if before is None or after is None else after - before,
        file_bytes=open_checkpoint(model, trust).bytes,
        threads=torch.get_num_threads(),
        step=step,
    )


@torch.inference_mode()
def speed_of(
    model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, kv_bits: int = 16
) -> tuple[Speed, Cache, str]:
    """Speed of reading `ids` [tokens] and of making `new_tokens` after them, the cache, and the name of the step."""
    step, readings, steps = step_of(model), [], []
    for _ in range(PROMPTS + 1):
        cache = new_cache(model, kv_bits, step, len(ids) + new_tokens)
        started = time.perf_counter()
        token = _read(model, ids, cache)  # [1]
        readings.append(time.perf_counter() - started)
    advance = _advance(model, step, cache)
    for _ in range(new_tokens):
        started = time.perf_counter()
        token = torch.tensor([advance(token).argmax().item()], device=ids.device)
        steps.append(time.perf_counter() - started)
    prefill, decode = statistics.median(readings[1:]), statistics.median(steps[1:] or steps)
    return Speed(len(ids) / prefill, 1 / decode), cache, step.name


def _read(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read `ids` [tokens] in chunks, as `generate` does; the most likely next token [1]."""
    how = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for part in ids.split(PREFILL_CHUNK):
        logits = model(part[None], past_key_values=cache, use_cache=True, **how).logits[:, -1]
    return torch.tensor([logits.argmax().item()], device=ids.device)  # a number: it waits for the device


def _advance(model: PreTrainedModel, step: Step, cache: Cache) -> Callable[[torch.Tensor], torch.Tensor]:
    if step.decoder is None or not isinstance(cache, StoreCache):
        return lambda token: model(token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    decoder, pads = step.decoder, torch.zeros(1, dtype=torch.long)
    return lambda token: decoder.advance(token, pads, cache)


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads. Experts are counted as if all of them ran."""
    skipped = {id(part) for module in _looked_up(model) for part in _parts(module)}
    seen = {id(part): part for part in _parts(model) if id(part) not in skipped}
    return sum(part.numel() * part.element_size() for part in seen.values())


def _looked_up(model: PreTrainedModel) -> list[nn.Module]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, TiedHead) or getattr(head, "weight", None) is getattr(embedding, "weight", None):
        return []
    return [embedding] if is_table(embedding) or isinstance(embedding, QuantEmbedding) else []


def _parts(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def bandwidth(count: int, device: str = "cpu") -> float:
    """Bytes per second of a plain read of `count` bytes, at most `LARGEST_READ`: the best of `READS`."""
    read = torch.ones(max(min(count, LARGEST_READ) // 4, 1), device=device)  # [numbers]
    return read.numel() * 4 / min(_timed(read) for _ in range(READS))


def _timed(read: torch.Tensor) -> float:
    started = time.perf_counter()
    read.amax().item()
    return time.perf_counter() - started


def resident() -> int | None:
    """Bytes of this process in memory now; None where the system has no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def activations_of(name: str) -> Activations:
    """The type of activations by its name. Raises `DataError`."""
    if name == "int8":
        return "int8"
    if name == "float":
        return "float"
    raise DataError(f"--activations is float or int8, got {name!r}")


def prompt_of(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Random ids [tokens], the same for every model of a vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
