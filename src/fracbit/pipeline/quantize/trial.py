"""What a calibrated run will take, measured on this machine before it starts: one block is quantized, with few samples.

    seconds = start + blocks x (a + b x samples),    a and b from two trials after one to warm up

Every quantizer, correction and transform counts, since the block goes through the loop itself. Distillation is tried on the
whole model, which is small where it is used. Ids are random: no text is read, and what reading or generating it takes is not
counted. Memory is the most that the trials took, and the states of the other samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import InMemory
from fracbit.data import Samples
from fracbit.models.attention import native_attention
from fracbit.models.backward import back, held_bytes, loss_gradients, through
from fracbit.models.blocks import blocks
from fracbit.models.walk import Hidden
from fracbit.pipeline.quantize.block import do_block
from fracbit.pipeline.quantize.calibrated import (
    SPILL_BYTES,
    calibrate_shards,
    embed_all,
    embed_source,
    write_rest,
)
from fracbit.pipeline.quantize.schedule import Item
from fracbit.pipeline.quantize.self_distill import distill_shards
from fracbit.pipeline.quantize.token_weights import stack_of
from fracbit.pipeline.quantize.work import Entrance, Work, batch_of, follows_model, prepare
from fracbit.pipeline.study.texts import sample_length
from fracbit.records.progress import DISTILLING, QUANTIZING, WEIGHING
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs, peak_rss

Result = TypeVar("Result")
FEW, MORE = 2, 6  # batches of the two trials


def measure_needs(recipe: Recipe, opened: Opened, device: str | torch.device = "cpu") -> Needs:
    """Measure what the calibrated `recipe` will take; nothing is written. Raises as the run."""
    with native_attention(opened.model):
        return _measured(recipe, opened, device)


def _measured(recipe: Recipe, opened: Opened, device: str | torch.device) -> Needs:
    calibration = recipe.calibration
    assert calibration is not None
    length, wanted = sample_length(calibration, opened), calibration.samples
    batch = batch_of(calibration, length, torch.device(device))
    few, more = (min(count * batch, wanted) for count in (FEW, MORE))
    # The start: tensors outside the blocks.
    ids = _random_ids(opened, more, length)  # [more, length]
    work = prepare(recipe, opened, device=device, samples=Samples(ids, "", seed=0, bos="stored", sources=()))
    target = InMemory()
    (first, outside), *shards = work.schedule.shards.items()
    start, (floats, stored) = _timed(lambda: write_rest(target, first, outside, work))
    tensors = floats if calibration.chain == "float" else stored
    # One block in the middle, with few and with more samples.
    number = len(shards) // 2
    if calibration.weigh == "loss":  # a Gram matrix for every linear
        alike = torch.ones(ids.numel())  # [more * length]
        work = replace(
            work, token_weights={item.name.removesuffix(".weight"): alike for item in shards[number][1]}
        )

    def trial(count: int) -> float:
        part = _with(work, ids[:count])
        took, hidden = _timed(lambda: embed_all(part, tensors, target, SPILL_BYTES))
        return took / len(shards) + _timed(lambda: _block(part, target, shards[number], hidden))[0]

    trial(few)  # loads code and starts threads
    short = trial(few)
    long = trial(more) if more > few else short
    slope = max(long - short, 0.0) / max(more - few, 1)  # seconds per sample and block
    phases = {QUANTIZING: start + len(shards) * (short + slope * (wanted - few))}
    if calibration.weigh == "loss":
        phases = {WEIGHING: wanted * _weighing(_with(work, ids[:few]), target)} | phases
    if calibration.distill:
        part = _with(work, ids[:few]).samples
        phases[DISTILLING] = _distilling(recipe, opened, device, samples=part, wanted=wanted)
    memory = peak_rss() + _states(work, wanted - more, len(shards))
    return Needs(memory, work.schedule.bytes, sum(phases.values()), phases)


def _random_ids(opened: Opened, samples: int, length: int) -> Tensor:
    vocabulary = int(opened.model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def _with(work: Work, ids: Tensor) -> Work:
    assert work.samples is not None
    return replace(work, samples=replace(work.samples, ids=ids))


def _block(work: Work, target: InMemory, shard: tuple[str, Sequence[Item]], hidden: Hidden) -> None:
    """Quantize one block on the states of the first."""
    name, items = shard
    number = list(work.schedule.shards).index(name) - 1
    path, module = blocks(work.opened.model, work.opened.family)[number]
    hidden = replace(hidden, index=number)
    exact = replace(hidden, states=hidden.states.clone()) if follows_model(work.calibration) else None
    do_block(work, target, name, items=items, path=path, module=module, entrance=Entrance(hidden, exact))


def _weighing(work: Work, target: InMemory) -> float:
    """Seconds per sample of the pass that weighs tokens: every block forwards and backwards, and the head."""
    assert work.samples is not None
    stack, ids = stack_of(work), work.samples.ids
    number = len(stack.paths) // 2
    hidden = replace(embed_source(work, target), index=number)
    forwards, after = _timed(lambda: through(stack, number, hidden))
    head, grads = _timed(lambda: loss_gradients(work.opened.model, work.opened.family, after, ids))
    backwards, _ = _timed(lambda: back(stack, number, hidden, grads))
    return (len(stack.paths) * (forwards + backwards) + head) / len(ids)


def _distilling(
    recipe: Recipe, opened: Opened, device: str | torch.device, *, samples: Samples | None, wanted: int
) -> float:
    """Seconds of distilling on `wanted` samples, from one and from two epochs on a few, after rounding to nearest."""
    calibration = recipe.calibration
    assert calibration is not None
    assert samples is not None
    plain = calibration.model_copy(update={"distill": 0, "tweak": "none", "axis": "scheme", "weigh": "equal"})
    rounded = recipe.model_copy(update={"quantizer": "rtn", "search": False, "calibration": plain})
    work, target = prepare(rounded, opened, device=device, samples=samples), InMemory()
    calibrate_shards(work, target)

    def epochs(count: int) -> float:
        plan = plain.model_copy(update={"distill": count, "rate": calibration.rate})
        part = replace(work, recipe=rounded.model_copy(update={"calibration": plan}))
        return _timed(lambda: distill_shards(part, target))[0]

    one = epochs(1)
    epoch = max(epochs(2) - one, 0.0)
    return max(one - epoch, 0.0) + calibration.distill * epoch * wanted / len(samples.ids)


def _states(work: Work, samples: int, count: int) -> int:
    """Bytes of what `samples` more samples take at once in a model of `count` blocks: states, and weights of tokens."""
    calibration = work.calibration
    assert work.samples is not None
    width = int(work.opened.model.config.get_text_config().hidden_size)
    one = samples * work.samples.ids.shape[1] * width * work.dtype.itemsize
    copies = 2 if calibration.tweak != "none" or calibration.chain == "float" else 1
    held = copies * one if copies * one <= SPILL_BYTES else 0
    if calibration.weigh == "equal":
        return held
    weights = 4 * samples * work.samples.ids.shape[1] * len(work.opened.linears)
    return max(held, one + held_bytes(one, count)) + weights


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
