"""Walking through a causal language model block by block: `embed`, `advance` through each block, `head`.

The whole forward of every architecture is reproduced without knowing it: `embed` runs the model's own forward
with blocks that only note what they are called with (rotary tables, ALiBi, masks: one per block where sliding
and full attention alternate) and stop it before the last one returns; `head` runs it again with blocks that
return the walked states. So only the embeddings, the head and the block at hand need to be in memory.
Law: walk = whole forward.

Patched forwards and hooks are taken off on the way out, also when something raises.
"""

import re
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
    HandedOn,
    Stop,
    device_of,
    equal,
    first_of,
    handed,
    move,
    run,
    until_stopped,
    without_states,
)
from fracbit.models.family import Family
from fracbit.models.spill import storage

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes the tensor of a shape and type that hidden states are kept in."""
Visit = Callable[[str, torch.Tensor], None]
"""Called with a linear's name and its input `[tokens, in]`, once per batch and use."""


@dataclass(frozen=True)
class Batch:
    """The samples `start..stop` that go through a block together, what each block is called with for them, and their token
    ids int64 [batch, tokens].
    """

    start: int
    stop: int
    calls: tuple[Call, ...]
    ids: torch.Tensor


@dataclass(frozen=True)
class Hidden:
    """The hidden states of all samples at the entrance of a block.

    - `states`: [samples, tokens, width], in memory or mapped to a file (`spill.storage`); with one more dimension for models
      that have several states a token.
    - `index`: number of the block that they enter; `batches`: how the samples are cut, with the arguments of every block.
    - `beside`: how many values the last block returned beside the states, which is how the model expects them; None: no tuple.
    """

    states: torch.Tensor
    index: int
    batches: tuple[Batch, ...]
    beside: int | None = None


def embed(
    model: PreTrainedModel,
    family: Family,
    tokens: torch.Tensor,
    batch: int = 8,
    room: Room = storage,
) -> Hidden:
    """Token ids to the states at the entrance of the first block, `batch` samples at a time.

    tokens: int64 [samples, tokens], every position a real token (no padding). room: makes the tensor for the states
    [samples, tokens, width] from its shape and type. Raises DataError for ids outside the vocabulary, SourceError when the
    model's tensors outside the blocks are not in memory, or when it cannot be walked.
    """
    stack = [block for _, block in blocks(model, family)]
    _check_tokens(model, tokens)
    _check_present(model, family)
    batches: list[Batch] = []
    states: torch.Tensor | None = None
    for start in range(0, len(tokens), batch):
        stop = min(start + batch, len(tokens))
        first, calls = entrance(model, stack, tokens[start:stop])  # [batch, tokens, width]
        axis = _axis_of(first.shape, stop - start, tokens.shape[1])
        if axis is None:
            raise SourceError(
                f"the blocks of {type(model).__name__} take states of shape {tuple(first.shape)} instead of "
                "[samples, tokens, width]; calibrate another model, or quantize this one without data."
            )
        if axis:
            first, calls = first.movedim(axis, 0), [replace(call, axis=axis) for call in calls]
        if states is None:
            states = room((len(tokens), *first.shape[1:]), first.dtype)  # [samples, tokens, width]
        states[start:stop].copy_(first)
        batches.append(Batch(start, stop, _shared(calls, batches), tokens[start:stop]))
    if states is None:
        raise DataError("there are no samples to embed: pass at least one row of token ids.")
    return Hidden(states, 0, tuple(batches))


def advance(block: nn.Module, hidden: Hidden, out: torch.Tensor | None = None) -> Hidden:
    """The states at the block's exit. No gradients; `forward` is the differentiable step for one batch.

    out: where to put them, which may be `hidden.states` itself. Raises WeightError naming the sample and the
    layer when a state is NaN or Inf.
    """
    states = torch.empty_like(hidden.states) if out is None else out
    beside: int | None = None
    batches: list[Batch] = []
    for batch in hidden.batches:
        rows = hidden.states[batch.start : batch.stop]  # [batch, tokens, width]
        with torch.no_grad():
            result = run(block, rows, batch.calls[hidden.index])
        if not bool(torch.isfinite(result.states).all()):
            _blame(block, hidden, batch)
        states[batch.start : batch.stop].copy_(result.states)
        beside = None if result.rest is None else len(result.rest)
        # Kept where the states are, as they are needed for all batches at once.
        batches.append(_behind(batch, hidden.index, move(result.rest, states.device)))
    return replace(hidden, states=states, index=hidden.index + 1, batches=tuple(batches), beside=beside)


def _behind(batch: Batch, index: int, rest: tuple[Any, ...] | None) -> Batch:
    """The batch behind a block: later blocks are called with what it handed on. What it was called with is needed no more."""
    if not any(_hands_on(call) for call in batch.calls):
        return batch
    later = [handed(call, index, rest) for call in batch.calls[index + 1 :]]
    return replace(batch, calls=(*[Call((), {})] * (index + 1), *later))


def _hands_on(value: Any) -> bool:
    """Whether arguments hold something that an earlier block returns."""
    if isinstance(value, Call):
        return _hands_on(value.args) or _hands_on(dict(value.kwargs))
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return isinstance(value, HandedOn) or any(map(_hands_on, inside))


def forward(
    block: nn.Module, states: torch.Tensor, call: Call, device: torch.device | None = None
) -> torch.Tensor:
    """One batch through a block, differentiable: states [samples, tokens, width] to the same shape, on
    `device`, by default the block's.
    """
    return run(block, states, call, device).states


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
            logits = logits_of(model, family, states, batch.ids, hidden=hidden)
        yield logits  # [batch, tokens, vocabulary]


def logits_of(
    model: PreTrainedModel, family: Family, states: torch.Tensor, ids: torch.Tensor, *, hidden: Hidden
) -> torch.Tensor:
    """Logits [samples, tokens, vocabulary] of the last block's `states` [samples, tokens, width], differentiable.

    `ids` are those of these samples; `hidden` the walk that they come from.
    """
    stack = [block for _, block in blocks(model, family)]
    # The first patched block drops what the embeddings give; of the ids, some models read more than their number.
    ids = ids.to(states.device)  # [samples, tokens]
    exits = states.movedim(0, hidden.batches[0].calls[-1].axis)
    result = exits if hidden.beside is None else (exits, *[None] * hidden.beside)
    with _patched(stack, [partial(_hand, result)] * len(stack)):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def head(model: PreTrainedModel, family: Family, hidden: Hidden) -> torch.Tensor:
    """Logits [samples, tokens, vocabulary] of all samples at once; `head_batches` gives them in parts."""
    return torch.cat(list(head_batches(model, family, hidden)))  # [samples, tokens, vocabulary]


def _hand(result: Any, *args: Any, **kwargs: Any) -> Any:
    return result


def entrance(
    model: PreTrainedModel, stack: list[nn.Module], tokens: torch.Tensor
) -> tuple[torch.Tensor, list[Call]]:
    """The first block's states and every block's arguments for one batch. Raises SourceError when it cannot be walked."""
    entered: list[torch.Tensor] = []
    calls: list[Call] = []
    beside = 0

    def note(*args: Any, **kwargs: Any) -> Any:
        states, call = without_states(args, kwargs)
        entered.append(states)
        calls.append(call)
        if len(calls) == len(stack):
            raise Stop
        # Models take either the result or its first element; with one more dimension in front both are a
        # tensor that the next block can be called with, and that block looks at its other arguments only.
        if not beside:
            return entered[0].unsqueeze(0)  # [1, batch, tokens, width]
        return entered[0], *(HandedOn(len(calls) - 1, number) for number in range(beside))

    ids = tokens.to(device_of(model.get_input_embeddings()))  # [batch, tokens]
    for attempt in range(2):
        try:
            with torch.no_grad(), _patched(stack, [note] * len(stack)), until_stopped():
                model(input_ids=ids, use_cache=False)
            break
        except Exception as error:  # code of any model
            # A model that takes several values from a block says so.
            wanted = re.search(r"not enough values to unpack \(expected (\d+)", str(error))
            if attempt or not wanted or not calls:
                raise _no_walk(model, str(error)) from error
            beside = int(wanted[1]) - 1
            entered.clear()
            calls.clear()
    if len(calls) != len(stack):
        raise _no_walk(model, f"it called {len(calls)} of its {len(stack)} blocks")
    return entered[0], calls


def _no_walk(model: PreTrainedModel, reason: str) -> SourceError:
    reason = reason.partition("\n")[0]
    return SourceError(
        f"{type(model).__name__} cannot be calibrated block by block ({reason}); quantize it without calibration text"
    )


def _axis_of(shape: torch.Size, samples: int, length: int) -> int | None:
    """Where the samples are in the states of a batch: in front, or behind the tokens or the states that each has several of."""
    if len(shape) == 4 and (samples, length) in (shape[:2], shape[1:3]):
        return 0 if shape[:2] == (samples, length) else 1
    return shape.index(samples) if len(shape) == 3 and samples in shape[:2] else None


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
        exits = run(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index]).states
    bad = (~torch.isfinite(exits)).flatten(1).any(1).nonzero().flatten()  # [samples with NaN or Inf]
    sample = batch.start + int(bad[0])
    raise WeightError(
        f"block {hidden.index} gives NaN or Inf for sample {sample}, "
        f"first in {culprits[0] or 'the block itself'}; "
        "run it in float32 or bfloat16, or leave this sample out."
    )
