"""Gradients of the end loss at every linear of a model, block by block, in the memory of one block and of states.

    gradient_squares:   for each piece of the samples: forwards through all blocks -> head -> backwards

Samples go through all blocks and back in pieces, so that the states before every block take no more memory than those of all
samples before one, or `LEAST_BYTES`. Weights get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.models.blocks import blocks, linears
from fracbit.models.calls import device_of
from fracbit.models.family import Family
from fracbit.models.text_way import held_on
from fracbit.models.walk import Hidden, advance, forward, logits_of
from fracbit.records.progress import Progress

LEAST_BYTES = 1 << 28  # of the states of a piece: blocks are loaded twice for each


@dataclass(frozen=True, eq=False)
class Stack:
    """A float model whose blocks are in memory while they are used: `loaded(number)` is a context with the block."""

    model: PreTrainedModel
    family: Family
    loaded: Callable[[int], AbstractContextManager[nn.Module]]

    @property
    def paths(self) -> list[str]:
        """The full names of the blocks."""
        return [path for path, _ in blocks(self.model, self.family)]


def resident(model: PreTrainedModel, family: Family) -> Stack:
    """A model that is in memory as a whole."""
    return Stack(model, family, lambda number: nullcontext(blocks(model, family)[number][1]))


def gradient_squares(stack: Stack, hidden: Hidden, ids: Tensor, show: Progress) -> dict[str, Tensor]:
    """Mean over outputs of the squared gradient of the loss, [tokens] fp32, at the outputs of every linear, by its full name.

    `hidden`: the states of all samples at the first block; `ids` int64 [samples, tokens]. The loss is the sum of the next
    tokens' cross-entropies. Linears that see all tokens have them in the order of the samples; experts have those routed to
    them, and experts that no token was routed to are left out.
    """
    parts: dict[str, list[Tensor]] = {}
    for first, last in pieces(hidden, len(stack.paths)):
        piece = _cut(hidden, first, last)
        start = hidden.batches[first].start
        for name, squares in _piece(stack, piece, ids[start : start + len(piece.states)]).items():
            parts.setdefault(name, []).append(squares)
        show("gradients of the loss", last, len(hidden.batches))
    return {name: torch.cat(squares) for name, squares in parts.items()}


def _piece(stack: Stack, hidden: Hidden, ids: Tensor) -> dict[str, Tensor]:
    """The squares for some samples."""
    count, entrances = len(stack.paths), [hidden]
    for number in range(count):
        entrances.append(through(stack, number, entrances[-1]))
    grads = loss_gradients(stack.model, stack.family, entrances.pop(), ids)
    found: dict[str, Tensor] = {}
    for number in reversed(range(count)):
        found |= back(stack, number, entrances.pop(), grads)
    return found


def pieces(hidden: Hidden, count: int) -> list[tuple[int, int]]:
    """Runs of batches, first and last + 1, whose states before each of `count` blocks take no more than `held_bytes`."""
    one = hidden.states[0].nbytes * count
    most = max(1, held_bytes(hidden.states.nbytes, count) // one)
    runs, first = list[tuple[int, int]](), 0
    for number, batch in enumerate(hidden.batches):
        if number > first and batch.stop - hidden.batches[first].start > most:
            runs.append((first, number))
            first = number
    return [*runs, (first, len(hidden.batches))]


def held_bytes(states: int, count: int) -> int:
    """Bytes for the states of a piece before each of `count` blocks, where those of all samples before one take `states`."""
    return min(max(states, LEAST_BYTES), states * count)


def _cut(hidden: Hidden, first: int, last: int) -> Hidden:
    """The samples of some batches alone."""
    start, stop = hidden.batches[first].start, hidden.batches[last - 1].stop
    batches = [
        replace(batch, start=batch.start - start, stop=batch.stop - start)
        for batch in hidden.batches[first:last]
    ]
    return replace(hidden, states=hidden.states[start:stop], batches=tuple(batches))


def through(stack: Stack, number: int, hidden: Hidden) -> Hidden:
    """The states behind a block."""
    with stack.loaded(number) as block:
        return advance(block, hidden)


def loss_gradients(model: PreTrainedModel, family: Family, hidden: Hidden, ids: Tensor) -> Tensor:
    """The gradient [samples, tokens, width] of the loss at the states before the head, one sample at a time.

    The loss is a sum, so a gradient does not depend on how many samples there are. `ids` int64 [samples, tokens].
    """
    grads = torch.empty_like(hidden.states)
    for sample, row in enumerate(ids):
        states = hidden.states[sample : sample + 1].to(held_on(model))
        states = states.detach().requires_grad_()  # [1, tokens, width]
        with torch.enable_grad():
            logits = logits_of(model, family, states, row[None], hidden=hidden)  # [1, tokens, vocabulary]
        # The gradient of cross-entropy: probabilities, less 1 for the next token; the last token has none.
        wrong = logits.detach()[0].float().softmax(-1)  # [tokens, vocabulary]
        wrong[torch.arange(len(row) - 1), row[1:]] -= 1
        wrong[-1] = 0
        grads[sample : sample + 1].copy_(torch.autograd.grad(logits, states, wrong[None].to(logits.dtype))[0])
    return grads


def back(stack: Stack, number: int, hidden: Hidden, grads: Tensor) -> dict[str, Tensor]:
    """Take `grads` [samples, tokens, width], in place, from the exit of a block to its entrance, where `hidden` is.

    Returns the mean squares [tokens] of those at the outputs of its linears, by full name.
    """
    path, parts = stack.paths[number], dict[str, list[Tensor]]()

    def seen(name: str, grad: Tensor) -> None:  # grad [tokens, out]
        parts.setdefault(f"{path}.{name}", []).append(grad.float().square().mean(1).cpu())  # [tokens]

    with stack.loaded(number) as block, _watching(block, linears(block, stack.family), seen):
        for batch in hidden.batches:
            rows = slice(batch.start, batch.stop)
            states = hidden.states[rows].detach().to(device_of(block))  # [batch, tokens, width]
            states.requires_grad_()
            with torch.enable_grad():
                exits = forward(block, states, batch.calls[hidden.index])  # [batch, tokens, width]
            found = torch.autograd.grad(exits, states, grads[rows].to(exits))[0]  # [batch, tokens, width]
            grads[rows].copy_(found)
    return {name: torch.cat(squares) for name, squares in parts.items()}


@contextmanager
def _watching(block: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A context in which gradients at the outputs of the named linears are shown."""

    def watch(name: str, module: nn.Module, args: Any, result: Tensor) -> None:
        result.register_hook(partial(show, name))

    def show(name: str, grad: Tensor) -> None:
        seen(name, grad.reshape(-1, grad.shape[-1]))  # [tokens, out]

    with ExitStack() as remove:
        for name in names:
            handle = block.get_submodule(name).register_forward_hook(partial(watch, name))
            remove.callback(handle.remove)
        yield
