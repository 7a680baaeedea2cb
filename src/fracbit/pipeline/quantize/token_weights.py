"""How much each token counts at each linear: the squared gradient of the end loss at its output.

    s_t = root of the mean over outputs j of (dl / dz_tj)^2, divided by its mean over tokens;    H = sum of s_t x_t x_t^T

z = W x are the outputs of the linear in the float model, l the sum of next-token losses on the calibration samples. This is
eq. 7 of GuidedQuant (Kim et al. 2025, arXiv:2505.07004) with one group of outputs, but for the root: squares have heavy tails,
a few tokens make up most of H, and less was gained with them (docs/LOG.md). One backward pass gives the weights of all linears.
Blocks are walked forwards once, and the states at the entrance of every few of them are kept; backwards, those in between are
made again. So memory holds about twice the root of the number of blocks times the states, in files above `spill_bytes`.

Experts of a mixture see the tokens that are routed to them, and the quantized chain may route otherwise: they have no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fracbit.checkpoint.output import Shards
from fracbit.models.backward import back_through, loss_gradients
from fracbit.models.blocks import blocks, groups
from fracbit.models.install import materialize, release
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, advance
from fracbit.pipeline.quantize.reader import read_items
from fracbit.pipeline.quantize.schedule import Item
from fracbit.pipeline.quantize.work import Work, walk_key

FILE = "token-weights.safetensors"


def token_weights(
    work: Work, target: Shards, hidden: Hidden, shards: Sequence[Sequence[Item]], spill_bytes: int
) -> Mapping[str, Tensor]:
    """The weights [samples * tokens] fp32 of every linear by its full name, mean 1; from an earlier run where there is one.

    `hidden`: the float model's states at its first block; `shards`: the items of every block.
    """
    path = None if target.journal is None else target.journal / FILE
    if path is not None and path.is_file():
        return load_file(path)
    known = {} if work.memory is None else work.memory.token_weights
    key = walk_key(work)
    if key not in known:
        known[key] = _measured(work, target, hidden, shards, spill_bytes)
    if path is not None:
        part = path.with_suffix(".tmp")
        save_file(dict(known[key]), part)
        part.replace(path)
    return known[key]


def _measured(
    work: Work, target: Shards, hidden: Hidden, shards: Sequence[Sequence[Item]], spill_bytes: int
) -> dict[str, Tensor]:
    assert work.samples is not None
    model, family = work.opened.model, work.opened.family
    count = len(shards)
    stride = math.isqrt(count)
    states = hidden.states
    place = target.journal if held_at_once(count) * states.nbytes > spill_bytes else None
    room = partial(storage, states.shape, states.dtype, place)
    starts = {0: hidden}
    # Forwards: the states at the entrance of every few blocks.
    for index in range(count):
        held = hidden.states if index % stride else room()
        hidden = through(work, shards[index], hidden, held)
        if not (index + 1) % stride and index + 1 < count:
            starts[index + 1] = hidden
        work.show("token weights, forwards", index + 1, 2 * count)
    grads = loss_gradients(model, family, hidden, work.samples.ids, room())
    # Backwards: those in between are made again, last entrances first.
    found: dict[str, Tensor] = {}
    for start in sorted(starts, reverse=True):
        stop = min(start + stride, count)
        entrances = [starts.pop(start)]
        for index in range(start, stop - 1):
            entrances.append(through(work, shards[index], entrances[-1], room()))
        for index in range(stop - 1, start - 1, -1):
            found |= back(work, shards[index], entrances.pop(), grads)
            work.show("token weights, backwards", 2 * count - index, 2 * count)
    return found


def held_at_once(count: int) -> int:
    """States that are held at once in a model of `count` blocks, gradients among them."""
    return 2 * math.isqrt(count) + 2


def through(work: Work, items: Sequence[Item], hidden: Hidden, out: Tensor) -> Hidden:
    """The states behind a block."""
    path, module = blocks(work.opened.model, work.opened.family)[hidden.index]
    _load(work, items, path)
    hidden = advance(module, hidden, out)
    release(module)
    return hidden


def back(work: Work, items: Sequence[Item], hidden: Hidden, grads: Tensor) -> dict[str, Tensor]:
    """Take `grads` through a block, and the weights of tokens at its linears."""
    path, module = blocks(work.opened.model, work.opened.family)[hidden.index]
    _load(work, items, path)
    names = [name for group in groups(module, work.opened.family) for name in group]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def seen(name: str, grad: Tensor) -> None:  # grad [tokens, out]
        parts[name].append(grad.float().square().mean(1).sqrt().cpu())  # [tokens]

    back_through(module, hidden, grads, names, seen)
    release(module)
    tokens = hidden.states.shape[0] * hidden.states.shape[1]
    whole = {name: torch.cat(part) for name, part in parts.items() if part}  # [tokens seen] each
    return {
        f"{path}.{name}": weights / weights.mean().clamp(min=torch.finfo(torch.float32).tiny)
        for name, weights in whole.items()
        if len(weights) == tokens
    }


def _load(work: Work, items: Sequence[Item], path: str) -> None:
    """Give a block its float weights."""
    module = work.opened.model.get_submodule(path)
    tensors = read_items(work.reader, items)[0]
    materialize(
        module, {name.removeprefix(f"{path}."): t for name, t in tensors.items()}, work.dtype, work.device
    )
