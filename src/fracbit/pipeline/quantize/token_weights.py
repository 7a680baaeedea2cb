"""How much each token counts at each linear: the squared gradient of the end loss at its output.

    s_t = root of the mean over outputs j of (dl / dz_tj)^2, divided by its mean over tokens;    H = sum of s_t x_t x_t^T

z = W x are the outputs of the linear in the float model, l the sum of next-token losses on the calibration samples. This is
eq. 7 of GuidedQuant (Kim et al. 2025, arXiv:2505.07004) with one group of outputs, but for the root: squares have heavy tails,
a few tokens make up most of H, and less was gained with them (docs/LOG.md). One backward pass gives the weights of all linears.
Samples go through all blocks and back in pieces, so that the states before every block take no more memory than those of all
samples before one.

Experts of a mixture see the tokens that are routed to them, and the quantized chain may route otherwise: they have no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fracbit.checkpoint.output import Shards
from fracbit.models.backward import back_through, loss_gradients
from fracbit.models.blocks import blocks, groups
from fracbit.models.install import materialize, release
from fracbit.models.walk import Hidden, advance
from fracbit.pipeline.quantize.reader import read_items
from fracbit.pipeline.quantize.schedule import Item
from fracbit.pipeline.quantize.work import Work, walk_key

FILE = "token-weights.safetensors"
LEAST_BYTES = 1 << 28  # of the states of a piece: blocks are loaded twice for each


def token_weights(
    work: Work, target: Shards, hidden: Hidden, shards: Sequence[Sequence[Item]]
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
        known[key] = _measured(work, hidden, shards)
    if path is not None:
        part = path.with_suffix(".tmp")
        save_file(dict(known[key]), part)
        part.replace(path)
    return known[key]


def _measured(work: Work, hidden: Hidden, shards: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for first, last in _pieces(hidden, len(shards)):
        for name, sizes in _piece(
            work, _cut(hidden, first, last), shards, hidden.batches[first].start
        ).items():
            parts.setdefault(name, []).append(sizes)
        work.show("weighing tokens", last, len(hidden.batches))
    tokens = hidden.states.shape[0] * hidden.states.shape[1]
    whole = {name: torch.cat(sizes) for name, sizes in parts.items()}  # [tokens seen] each
    return {
        name: sizes / sizes.mean().clamp(min=torch.finfo(torch.float32).tiny)
        for name, sizes in whole.items()
        if len(sizes) == tokens
    }


def _piece(work: Work, hidden: Hidden, shards: Sequence[Sequence[Item]], sample: int) -> dict[str, Tensor]:
    """Sizes of gradients [tokens] at every linear, for some samples, of which the first is number `sample`."""
    assert work.samples is not None
    ids = work.samples.ids[sample : sample + len(hidden.states)]  # [samples, tokens]
    entrances = [hidden]
    for items in shards:
        entrances.append(through(work, items, entrances[-1]))
    grads = loss_gradients(work.opened.model, work.opened.family, entrances.pop(), ids)
    found: dict[str, Tensor] = {}
    for items in reversed(shards):
        found |= back(work, items, entrances.pop(), grads)
    return found


def _pieces(hidden: Hidden, count: int) -> list[tuple[int, int]]:
    """Runs of batches, first and last + 1, whose states before each of `count` blocks take no more than `held_bytes`."""
    one = hidden.states[0].nbytes * count
    most = max(1, held_bytes(hidden.states.nbytes) // one)
    runs, first = list[tuple[int, int]](), 0
    for number, batch in enumerate(hidden.batches):
        if number > first and batch.stop - hidden.batches[first].start > most:
            runs.append((first, number))
            first = number
    return [*runs, (first, len(hidden.batches))]


def held_bytes(states: int) -> int:
    """Bytes for the states of a piece before every block, where those of all samples before one block take `states`."""
    return max(states, LEAST_BYTES)


def _cut(hidden: Hidden, first: int, last: int) -> Hidden:
    """The samples of some batches alone."""
    start, stop = hidden.batches[first].start, hidden.batches[last - 1].stop
    batches = [
        replace(batch, start=batch.start - start, stop=batch.stop - start)
        for batch in hidden.batches[first:last]
    ]
    return replace(hidden, states=hidden.states[start:stop], batches=tuple(batches))


def through(work: Work, items: Sequence[Item], hidden: Hidden) -> Hidden:
    """The states behind a block."""
    path, module = blocks(work.opened.model, work.opened.family)[hidden.index]
    _load(work, items, path)
    hidden = advance(module, hidden)
    release(module)
    return hidden


def back(work: Work, items: Sequence[Item], hidden: Hidden, grads: Tensor) -> dict[str, Tensor]:
    """Take `grads` [samples, tokens, width] through a block in place; sizes of those at its linears [tokens], by full name."""
    path, module = blocks(work.opened.model, work.opened.family)[hidden.index]
    _load(work, items, path)
    names = [name for group in groups(module, work.opened.family) for name in group]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def seen(name: str, grad: Tensor) -> None:  # grad [tokens, out]
        parts[name].append(grad.float().square().mean(1).sqrt().cpu())  # [tokens]

    back_through(module, hidden, grads, names, seen)
    release(module)
    return {f"{path}.{name}": torch.cat(part) for name, part in parts.items() if part}


def _load(work: Work, items: Sequence[Item], path: str) -> None:
    """Give a block its float weights."""
    module = work.opened.model.get_submodule(path)
    tensors = read_items(work.reader, items)[0]
    materialize(
        module, {name.removeprefix(f"{path}."): t for name, t in tensors.items()}, work.dtype, work.device
    )
