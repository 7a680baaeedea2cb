"""Walking through a causal language model block by block: `embed`, `advance` through each block, `head`.

The whole forward of every architecture is reproduced without knowing it: `embed` runs the model's own forward
with blocks that only note what they are called with (rotary tables, ALiBi, masks: one per block where sliding
and full attention alternate) and stop it before the last one returns; `head` runs it again with blocks that
return the walked states. So only the embeddings, the head and the block at hand need to be in memory.
Law: walk = whole forward.

Patched forwards and hooks are taken off on the way out, also when something raises.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fracbit.errors import DataError, SourceError, WeightError
from fracbit.models.blocks import blocks
from fracbit.models.calls import (
    Call,
    Stop,
    device_of,
    equal,
    first_of,
    run,
    until_stopped,
    without_states,
)
from fracbit.models.family import Family

Visit = Callable[[str, torch.Tensor], None]
"""Called with a linear's name and its input `[tokens, in]`, once per batch and use."""


@dataclass(frozen=True)
class Batch:
    """The samples `start..stop` that go through a block together, and what each block is called with for
    them.
    """

    start: int
    stop: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Hidden:
    """The hidden states of all samples at the entrance of a block.

    Attributes:
        states: [samples, tokens, width], in memory or mapped to a file (`spill.storage`).
        index: number of the block that they enter.
        batches: how the samples are cut, with the arguments of every block.
        tupled: whether the last block returned a tuple, which is how the model expects its states.

    """

    states: torch.Tensor
    index: int
    batches: tuple[Batch, ...]
    tupled: bool = False


def embed(
    model: PreTrainedModel,
    family: Family,
    tokens: torch.Tensor,
    batch: int = 8,
    out: torch.Tensor | None = None,
) -> Hidden:
    """Token ids to the states at the entrance of the first block, `batch` samples at a time.

    tokens: int64 [samples, tokens], every position a real token (no padding). out: where to put the states
    [samples, tokens, width]. Raises DataError for ids outside the vocabulary, SourceError when the model's
    tensors outside the blocks are not in memory.
    """
    stack = [block for _, block in blocks(model, family)]
    _check_tokens(model, tokens)
    _check_present(model, family)
    batches: list[Batch] = []
    states = out
    for start in range(0, len(tokens), batch):
        stop = min(start + batch, len(tokens))
        first, calls = _entrance(model, stack, tokens[start:stop])  # [batch, tokens, width]
        if first.dim() != 3 or len(first) != stop - start:
            raise SourceError(
                f"the blocks of {type(model).__name__} take states of shape {tuple(first.shape)} instead of "
                "[samples, tokens, width]; calibrate another model, or quantize this one without data."
            )
        if states is None:
            states = torch.empty(len(tokens), *first.shape[1:], dtype=first.dtype)  # [samples, tokens, width]
        states[start:stop].copy_(first)
        batches.append(Batch(start, stop, _shared(calls, batches)))
    if states is None:
        raise DataError("there are no samples to embed: pass at least one row of token ids.")
    return Hidden(states, 0, tuple(batches))


def advance(block: nn.Module, hidden: Hidden, out: torch.Tensor | None = None) -> Hidden:
    """The states at the block's exit. No gradients; `forward` is the differentiable step for one batch.

    out: where to put them, which may be `hidden.states` itself. Raises WeightError naming the sample and the
    layer when a state is NaN or Inf.
    """
    states = torch.empty_like(hidden.states) if out is None else out
    tupled = False
    for batch in hidden.batches:
        rows = hidden.states[batch.start : batch.stop]  # [batch, tokens, width]
        with torch.no_grad():
            result = run(block, rows, batch.calls[hidden.index])
        tupled = isinstance(result, tuple)
        exits = first_of(result)  # [batch, tokens, width]
        if not bool(torch.isfinite(exits).all()):
            _blame(block, hidden, batch)
        states[batch.start : batch.stop].copy_(exits)
    return replace(hidden, states=states, index=hidden.index + 1, tupled=tupled)


def forward(
    block: nn.Module, states: torch.Tensor, call: Call, device: torch.device | None = None
) -> torch.Tensor:
    """One batch through a block, differentiable: states [samples, tokens, width] to the same shape, on
    `device`, by default the block's.
    """
    return first_of(run(block, states, call, device))


def observe(
    block: nn.Module, hidden: Hidden, names: Iterable[str], visit: Visit, out: torch.Tensor | None = None
) -> Hidden:
    """`advance`, showing the inputs of the linears called `names` (paths inside the block) to `visit` on the
    way.
    """
    with _watching(block, names, visit):
        return advance(block, hidden, out)


def peek(block: nn.Module, hidden: Hidden, names: Sequence[str], visit: Visit) -> None:
    """Like `observe`, but nothing is kept, and each batch stops as soon as every named linear was reached."""
    for batch in hidden.batches:
        left = set(names)

        def seen(name: str, x: torch.Tensor, left: set[str] = left) -> None:
            visit(name, x)
            left.discard(name)
            if not left:
                raise Stop

        with _watching(block, names, seen), torch.no_grad(), until_stopped():
            run(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index])


def record(block: nn.Module, hidden: Hidden, sublayer: Sequence[str]) -> list[Call]:
    """What the first of a sublayer's modules is called with, batch by batch, its input included; for `replay`."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        raise Stop

    handle = block.get_submodule(sublayer[0]).register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in hidden.batches:
            with torch.no_grad(), until_stopped():
                run(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index])
    finally:
        handle.remove()
    return calls


def replay(block: nn.Module, sublayer: Sequence[str], call: Call) -> torch.Tensor:
    """The output of a sublayer's modules (`blocks.sublayer_of`): the first one called as recorded, the others
    on its output.
    """
    first, *rest = (block.get_submodule(name) for name in sublayer)
    result = first_of(first(*call.args, **call.kwargs))
    for module in rest:
        result = first_of(module(result))
    return result


def head_batches(model: PreTrainedModel, family: Family, hidden: Hidden) -> Iterator[torch.Tensor]:
    """Logits [samples, tokens, vocabulary], one batch of samples after the other, through the model's own
    last steps.
    """
    for batch in hidden.batches:
        states = hidden.states[batch.start : batch.stop]  # [batch, tokens, width]
        states = states.to(device_of(model.get_input_embeddings()))
        with torch.no_grad():
            logits = logits_of(model, family, states, hidden.tupled)
        yield logits  # [batch, tokens, vocabulary]


def logits_of(
    model: PreTrainedModel, family: Family, states: torch.Tensor, tupled: bool = False
) -> torch.Tensor:
    """Logits [samples, tokens, vocabulary] of the last block's `states` [samples, tokens, width], differentiable.

    `tupled`: as in `Hidden`.
    """
    stack = [block for _, block in blocks(model, family)]
    # Only the shape of the token ids matters: the first patched block drops what the embeddings give.
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)  # [samples, tokens]
    result = (states,) if tupled else states
    with _patched(stack, [partial(_hand, result)] * len(stack)):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def head(model: PreTrainedModel, family: Family, hidden: Hidden) -> torch.Tensor:
    """Logits [samples, tokens, vocabulary] of all samples at once; `head_batches` gives them in parts."""
    return torch.cat(list(head_batches(model, family, hidden)))  # [samples, tokens, vocabulary]


def _hand(result: Any, *args: Any, **kwargs: Any) -> Any:
    return result


def _entrance(
    model: PreTrainedModel, stack: list[nn.Module], tokens: torch.Tensor
) -> tuple[torch.Tensor, list[Call]]:
    """The first block's states and every block's arguments for one batch."""
    entered: list[torch.Tensor] = []
    calls: list[Call] = []

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        states, call = without_states(args, kwargs)
        entered.append(states)
        calls.append(call)
        if len(calls) == len(stack):
            raise Stop
        # Models take either the result or its first element; with one more dimension in front both are a
        # tensor that the next block can be called with, and that block looks at its other arguments only.
        return entered[0].unsqueeze(0)  # [1, batch, tokens, width]

    ids = tokens.to(device_of(model.get_input_embeddings()))  # [batch, tokens]
    with torch.no_grad(), _patched(stack, [note] * len(stack)), until_stopped():
        model(input_ids=ids, use_cache=False)
    if len(calls) != len(stack):
        raise SourceError(
            f"{type(model).__name__} called {len(calls)} of its {len(stack)} blocks; "
            "it cannot be walked block by block."
        )
    return entered[0], calls


@contextmanager
def _patched(stack: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Call these instead of the blocks' forwards; the blocks stay, since models read their attributes."""
    with ExitStack() as restore:
        for block, call in zip(stack, forwards, strict=True):
            own = vars(block).get("forward")  # accelerate, for one, puts a forward on the instance
            restore.callback(partial(_restore, block, own))
            vars(block)["forward"] = call
        yield


def _restore(block: nn.Module, own: Any) -> None:
    del vars(block)["forward"]
    if own is not None:
        vars(block)["forward"] = own


@contextmanager
def _watching(block: nn.Module, names: Iterable[str], visit: Visit) -> Iterator[None]:
    with ExitStack() as remove:
        for name in names:
            hook = partial(_show, name, visit)
            remove.callback(
                block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove
            )
        yield


def _show(name: str, visit: Visit, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    visit(name, x.detach().reshape(-1, x.shape[-1]))  # [batch * tokens, in]


def _shared(calls: list[Call], batches: list[Batch]) -> tuple[Call, ...]:
    """The calls of an earlier batch if they are equal, so that tables are kept once; with batches of one size
    they nearly always are.
    """
    for batch in batches:
        if equal(
            [(call.args, call.kwargs) for call in calls], [(call.args, call.kwargs) for call in batch.calls]
        ):
            return batch.calls
    return tuple(calls)


def _check_tokens(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise DataError(
            f"token ids must be [samples, tokens] with at least one of each; "
            f"got the shape {tuple(tokens.shape)}."
        )
    size = int(model.config.get_text_config().vocab_size)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise DataError(
            f"token ids run from {low} to {high}, the model's vocabulary from 0 to {size - 1}; "
            "use the model's own tokenizer."
        )


def _check_present(model: PreTrainedModel, family: Family) -> None:
    """Everything outside the blocks must be in memory, unsaved buffers included."""
    inside = f"{family.blocks}."
    both = [*model.named_parameters(), *model.named_buffers()]
    absent = [name for name, tensor in both if tensor.is_meta and not name.startswith(inside)]
    if absent:
        raise SourceError(
            f"{', '.join(absent[:5])} hold no values (meta device); "
            "materialize the tensors outside the blocks first."
        )


def _blame(block: nn.Module, hidden: Hidden, batch: Batch) -> None:
    """Raise, naming the first sample and the first module of the block that gives NaN or Inf."""
    culprits: list[str] = []

    def look(name: str, _: nn.Module, __: Any, result: Any) -> None:
        exits = result[0] if isinstance(result, tuple) else result
        if not culprits and isinstance(exits, torch.Tensor) and not bool(torch.isfinite(exits).all()):
            culprits.append(name)

    with ExitStack() as remove, torch.no_grad():
        for name, module in block.named_modules():
            remove.callback(module.register_forward_hook(partial(look, name)).remove)
        exits = first_of(run(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index]))
    bad = (~torch.isfinite(exits)).flatten(1).any(1).nonzero().flatten()  # [samples with NaN or Inf]
    sample = batch.start + int(bad[0])
    raise WeightError(
        f"block {hidden.index} gives NaN or Inf for sample {sample}, "
        f"first in {culprits[0] or 'the block itself'}; "
        "run it in float32 or bfloat16, or leave this sample out."
    )
