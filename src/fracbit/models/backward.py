"""Gradients of the end loss, block by block from the last to the first, in the memory of one block and its states.

`loss_gradients` starts at the head, `back_through` takes gradients from the exit of a block to its entrance and shows those at
the outputs of its linears on the way. Weights get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.models.calls import device_of
from fracbit.models.family import Family
from fracbit.models.walk import Hidden, forward, logits_of

Seen = Callable[[str, Tensor], None]
"""Called with a linear's name and the gradient [tokens, out] at its output, once per batch and use."""


def loss_gradients(
    model: PreTrainedModel, family: Family, hidden: Hidden, ids: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient [samples, tokens, width] of the loss at the states before the head, one sample at a time.

    The loss is the sum of the next tokens' cross-entropies, so that a gradient does not depend on how many samples there are.
    `ids` int64 [samples, tokens]; `out`: where to put the gradients.
    """
    out = torch.empty_like(hidden.states) if out is None else out
    for sample, row in enumerate(ids):
        states = hidden.states[sample : sample + 1].to(device_of(model.get_input_embeddings()))
        states = states.detach().requires_grad_()  # [1, tokens, width]
        logits = logits_of(model, family, states, hidden.tupled)  # [1, tokens, vocabulary]
        # The gradient of cross-entropy: probabilities, less 1 for the next token; the last token has none.
        wrong = logits.detach()[0].float().softmax(-1)  # [tokens, vocabulary]
        wrong[torch.arange(len(row) - 1), row[1:]] -= 1
        wrong[-1] = 0
        out[sample : sample + 1].copy_(torch.autograd.grad(logits, states, wrong[None].to(logits.dtype))[0])
    return out


def back_through(block: nn.Module, hidden: Hidden, grads: Tensor, names: Iterable[str], seen: Seen) -> None:
    """Take `grads` [samples, tokens, width], in place, from the exit of a block to its entrance, where `hidden` is."""
    with _watching(block, names, seen):
        for batch in hidden.batches:
            rows = slice(batch.start, batch.stop)
            states = (
                hidden.states[rows].detach().to(device_of(block)).requires_grad_()
            )  # [batch, tokens, width]
            with torch.enable_grad():
                exits = forward(block, states, batch.calls[hidden.index])  # [batch, tokens, width]
            found = torch.autograd.grad(exits, states, grads[rows].to(exits))[0]  # [batch, tokens, width]
            grads[rows].copy_(found)


@contextmanager
def _watching(block: nn.Module, names: Iterable[str], seen: Seen) -> Iterator[None]:
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
