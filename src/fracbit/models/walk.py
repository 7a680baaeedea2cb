"""Walking through a causal language model block by block: `embed`, `advance` through each block, `head`.

The whole forward of every architecture is reproduced without knowing it: `embed` runs the model's own forward
with blocks that only note what they are called with (rotary tables, ALiBi, masks: one per block where sliding
and full attention alternate) and stop it before the last one returns; `head` runs it again with blocks that
return the walked states. So only the embeddings, the head and the block at hand need to be in memory.
Law: walk = whole forward. A block that the model leaves out for text (Mllama's, which read images) hands on what it gets.

Patched forwards and hooks are taken off on the way out, also when something raises.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fracbit.errors import DataError, FracbitError, SourceError, WeightError, blamed_on, lacks_memory
from fracbit.models.blocks import blocks
from fracbit.models.calls import (
    Call,
    HandedOn,
    Returned,
    Stop,
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
from fracbit.models.text_way import WHOLE, TextWay, held_on, ways_through

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
    - `way`: how the ids went in, and how the head is reached.
    """

    states: torch.Tensor
    index: int
    batches: tuple[Batch, ...]
    beside: int | None = None
    way: TextWay = WHOLE


@dataclass(frozen=True)
class Entered:
    """What a model does with a batch before its first block: that one's `states`, every block's `calls`, the `way` in."""

    states: torch.Tensor
    calls: tuple[Call, ...]
    way: TextWay


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
    way: TextWay | None = None
    for start in range(0, len(tokens), batch):
        ids = tokens[start : start + batch]  # [batch, tokens]
        entered = entrance(model, stack, ids, way)
        first, calls, way = entered.states, entered.calls, entered.way  # [batch, tokens, width]
        axis = _samples_axis(model, stack, ids, entered)
        if axis:
            first, calls = first.movedim(axis, 0), tuple(replace(call, axis=axis) for call in calls)
        if states is None:
            states = room((len(tokens), *first.shape[1:]), first.dtype)  # [samples, tokens, width]
        states[start : start + len(ids)].copy_(first)
        batches.append(Batch(start, start + len(ids), _shared(calls, batches), ids))
    if states is None or way is None:
        raise DataError("there are no samples to embed: pass at least one row of token ids.")
    return Hidden(states, 0, tuple(batches), way=way)


def left_out(hidden: Hidden) -> tuple[int, ...]:
    """The numbers of the blocks, from the one that is entered, that the model leaves out for text."""
    calls = hidden.batches[0].calls
    return tuple(number for number in range(hidden.index, len(calls)) if calls[number].left_out)


def advance(block: nn.Module, hidden: Hidden, out: torch.Tensor | None = None) -> Hidden:
    """The states at the block's exit. No gradients; `forward` is the differentiable step for one batch.

    out: where to put them, which may be `hidden.states` itself. Raises WeightError naming the sample and the
    layer when a state is NaN or Inf.
    """
    states = torch.empty_like(hidden.states) if out is None else out
    beside: int | None = None
    batches: list[Batch] = []
    for batch in hidden.batches:
        with torch.no_grad():
            result = _ran(block, hidden, batch)
        if not bool(torch.isfinite(result.states).all()):
            _blame(block, hidden, batch)
        states[batch.start : batch.stop].copy_(result.states)
        beside = None if result.rest is None else len(result.rest)
        if batch.calls[hidden.index].left_out:
            beside = hidden.beside
        # Kept where the states are, as they are needed for all batches at once.
        batches.append(_behind(batch, hidden.index, move(result.rest, states.device)))
    return replace(hidden, states=states, index=hidden.index + 1, batches=tuple(batches), beside=beside)


_TOO_LARGE = (
    "memory ran out; take fewer samples at once (calibration.batch), or shorter ones (calibration.length)"
)


def _ran(block: nn.Module, hidden: Hidden, batch: Batch) -> Returned:
    """What a block gives for a batch. Raises SourceError where its code does not run on text alone, or memory runs out."""
    rows = hidden.states[batch.start : batch.stop]  # [batch, tokens, width]
    what = f"block {hidden.index} ({type(block).__name__}) does not run on text alone, so quantize without calibration text"
    try:
        with blamed_on(what, SourceError):
            return run(block, rows, batch.calls[hidden.index])
    except SourceError as error:
        if not lacks_memory(error.__cause__):
            raise
        raise SourceError(f"block {hidden.index} ({type(block).__name__}): {_TOO_LARGE}") from error.__cause__


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
            _ran(block, hidden, batch)


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
                _ran(block, hidden, batch)
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
        states = states.to(held_on(model))
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
        return hidden.way.logits(model, ids)


def head(model: PreTrainedModel, family: Family, hidden: Hidden) -> torch.Tensor:
    """Logits [samples, tokens, vocabulary] of all samples at once; `head_batches` gives them in parts."""
    return torch.cat(list(head_batches(model, family, hidden)))  # [samples, tokens, vocabulary]


def _hand(result: Any, *args: Any, **kwargs: Any) -> Any:
    return result


def entrance(
    model: PreTrainedModel, stack: list[nn.Module], tokens: torch.Tensor, way: TextWay | None = None
) -> Entered:
    """What the blocks are called with for one batch of ids [samples, tokens]; `way`: how they go in, if that is known.

    Raises SourceError when the model cannot be walked.
    """
    failed: list[SourceError] = []
    for each in (way,) if way is not None else ways_through(model, stack):
        found = _enter(model, stack, tokens, each)
        if isinstance(found, Entered):
            return found
        failed.append(found)
    raise failed[0]  # of the whole model


def _enter(
    model: PreTrainedModel, stack: list[nn.Module], tokens: torch.Tensor, way: TextWay
) -> Entered | SourceError:
    """What the blocks are called with on one way, or why it leads nowhere."""
    entered: list[torch.Tensor] = []
    calls: dict[int, Call] = {}
    beside = 0

    def note(number: int, *args: Any, **kwargs: Any) -> Any:
        if number in calls:
            raise _no_walk(model, f"it calls block {number} more than once")
        states, call = without_states(args, kwargs)
        entered.append(states)
        calls[number] = call
        if number == len(stack) - 1:
            raise Stop
        # Models take either the result or its first element; with one more dimension in front both are a
        # tensor that the next block can be called with, and that block looks at its other arguments only.
        if not beside:
            return entered[0].unsqueeze(0)  # [1, batch, tokens, width]
        return entered[0], *(HandedOn(number, place) for place in range(beside))

    forwards = [partial(note, number) for number in range(len(stack))]
    for attempt in range(2):
        try:
            with torch.no_grad(), _patched(stack, forwards), until_stopped():
                way.run(model, tokens)
            break
        except Exception as error:  # noqa: BLE001, code of any model
            # A model that takes several values from a block says so.
            wanted = re.search(r"not enough values to unpack \(expected (\d+)", str(error))
            if attempt or not wanted or not calls:
                return _why_not(model, error)
            beside = int(wanted[1]) - 1
            entered.clear()
            calls.clear()
    if not calls or list(calls) != sorted(calls):
        order = ", ".join(map(str, calls)) or "none"
        return _no_walk(model, f"of its {len(stack)} blocks it called {order}")
    found = tuple(calls.get(number, Call((), {}, left_out=True)) for number in range(len(stack)))
    return Entered(entered[0], found, way)


def _why_not(model: PreTrainedModel, error: Exception) -> SourceError:
    """Why a way leads nowhere, by what its forward raised. Raises errors of fracbit's own that do not speak of the source."""
    if isinstance(error, SourceError):
        return error
    if isinstance(error, FracbitError):
        raise error
    found = _no_walk(model, _TOO_LARGE if lacks_memory(error) else str(error))
    found.__cause__ = error
    return found


def repeats(model: PreTrainedModel, stack: list[nn.Module], ids: torch.Tensor, entered: Entered) -> bool:
    """Whether the model passes through its blocks more than once for `ids`; a walk sees the first pass alone."""
    called: list[int] = []

    def note(number: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(number)
        return without_states(args, kwargs)[0]  # [samples, tokens, width]

    forwards = [partial(note, number) for number in range(len(stack))]
    with (
        torch.no_grad(),
        _patched(stack, forwards),
        suppress(Exception),
    ):  # what comes behind may have no values
        entered.way.run(model, ids)
    return len(called) > len(set(called))


def _no_walk(model: PreTrainedModel, reason: str) -> SourceError:
    reason = reason.partition("\n")[0]
    return SourceError(
        f"{type(model).__name__} cannot be calibrated block by block ({reason}); quantize it without calibration text"
    )


def _samples_axis(model: PreTrainedModel, stack: list[nn.Module], ids: torch.Tensor, entered: Entered) -> int:
    """Which axis of a batch's states holds the samples. Raises SourceError when none does."""
    samples, length = ids.shape
    shape = entered.states.shape
    if samples == length > 1:  # the shape does not tell: that of one sample does
        samples, shape = 1, entrance(model, stack, ids[:1], entered.way).states.shape
    axis = _axis_of(shape, samples, length)
    if axis is None:
        raise SourceError(
            f"the blocks of {type(model).__name__} take states of shape {tuple(shape)} instead of "
            "[samples, tokens, width]; calibrate another model, or quantize this one without data."
        )
    return axis


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
    """Show the inputs of linears to `visit`. What it raises passes as it is: the block's code is not to blame for it."""
    raised: list[Exception] = []
    with ExitStack() as remove:
        for name in names:
            hook = partial(_show, name, visit, raised)
            remove.callback(
                block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove
            )
        try:
            yield
        except SourceError as error:
            if raised and error.__cause__ is raised[-1]:
                raise raised[-1] from None
            raise


def _show(
    name: str,
    visit: Visit,
    raised: list[Exception],
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(x, torch.Tensor):
        raise SourceError(
            f"linear {name} got {x!r} instead of states: the model cannot be calibrated on text alone"
        )
    try:
        visit(name, x.detach().reshape(-1, x.shape[-1]))  # [batch * tokens, in]
    except Exception as error:
        raised.append(error)
        raise


def _shared(calls: tuple[Call, ...], batches: list[Batch]) -> tuple[Call, ...]:
    """The calls of an earlier batch if they are equal, so that tables are kept once; with batches of one size
    they nearly always are.
    """
    for batch in batches:
        if equal(
            [(call.args, call.kwargs) for call in calls], [(call.args, call.kwargs) for call in batch.calls]
        ):
            return batch.calls
    return calls


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
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    if any(ties.get(name, "").startswith(inside) or name in ties.values() for name in absent):
        raise _no_walk(model, f"{absent[0]} outside its blocks is a weight of theirs")
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
