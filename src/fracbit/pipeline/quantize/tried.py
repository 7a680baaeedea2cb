"""One block of each kind is run before anything is written, packed and as floats of the same values: they must agree.

So no run ends well with an output that cannot run, such as one of a model whose code does more with a linear than to call it.
Weights are random and made on the spot, two experts stand for all, and tables are not made at all: memory holds one block, in
fp32 beside its packed form. Blocks of more than `LARGEST` weights are not tried, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.hf import packed_module
from fracbit.checkpoint.opened import Opened
from fracbit.errors import FracbitError, SourceError
from fracbit.models.blocks import blocks, weight_of
from fracbit.models.calls import Call, handed, run
from fracbit.models.code import decode_for_code
from fracbit.models.install import replace, set_weight
from fracbit.models.stand_in import fill, runnable
from fracbit.models.walk import entrance, repeats
from fracbit.numerics.packed import decode
from fracbit.numerics.ranges import quantize_tensor
from fracbit.pipeline.quantize.schedule import LayerItem, Schedule

_NUMBER = re.compile(r".*?\.\d+(?=\.)")  # the first block in a path
REPEATS = "the model passes through its blocks several times: they were calibrated on the first pass alone"
TOKENS = 6
LARGEST = 1 << 30  # weights of a block that is tried
APART = 1e-2  # most that packed and float outputs may differ, relative to the float's


def try_blocks(opened: Opened, schedule: Schedule, calibrated: bool = False) -> tuple[str, ...]:
    """Run one block of each kind. Raises `SourceError` naming one whose packed form fails, or gives other numbers.

    Returns notes where blocks cannot be run alone, not even as floats, and where a `calibrated` run sees a model only in part.
    """
    text = _try_text(opened, _stored(schedule, "linear"), calibrated)
    return (*text, *_try_towers(opened, _stored(schedule, "tower")))


def _stored(schedule: Schedule, kind: str) -> dict[str, StoredLayer]:
    """How the layers of a kind are stored, by name."""
    return {
        item.layer.name: item.stored
        for items in schedule.shards.values()
        for item in items
        if isinstance(item, LayerItem) and item.layer.kind == kind
    }


def _try_towers(opened: Opened, stored: Mapping[str, StoredLayer]) -> tuple[str, ...]:
    """Blocks of towers are called with states alone: no image is there to say what else they are called with."""
    notes: list[str] = []
    kinds = set[type[nn.Module]]()
    for name in stored:
        path = name[: _NUMBER.match(name).end()]  # type: ignore[union-attr]
        block = opened.model.get_submodule(path)
        if type(block) in kinds:
            continue
        kinds.add(type(block))
        mine = {
            each.removeprefix(f"{path}."): one for each, one in stored.items() if each.startswith(f"{path}.")
        }
        asked = list(signature(block.forward).parameters.values())[1:]
        given = {
            each.name: None
            for each in asked
            if each.default is each.empty and each.kind is not each.VAR_KEYWORD
        }
        states = torch.randn(
            1, TOKENS, next(iter(mine.values())).shape[1], generator=torch.Generator().manual_seed(0)
        )
        try:
            _try(path, block, mine, states, call=Call((), given))
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001, a block that is called with more than states
            notes.append(_untried(path, error))
    return tuple(notes)


def _try_text(opened: Opened, stored: Mapping[str, StoredLayer], calibrated: bool) -> tuple[str, ...]:
    if not stored:
        return ()
    try:
        model = runnable(opened.model, opened.family.blocks)
        stack = blocks(model, opened.family)
        ids = _ids(opened.model)
        entered = entrance(model, [block for _, block in stack], ids)
    except Exception as error:  # noqa: BLE001, code of any model
        return (_untried("the blocks", error),)
    notes = [REPEATS] if calibrated and repeats(model, [block for _, block in stack], ids, entered) else []
    kinds, rests = set[tuple[object, ...]](), dict[int, tuple[Any, ...] | None]()
    for number, (path, block) in enumerate(stack):
        mine = {
            name.removeprefix(f"{path}."): one for name, one in stored.items() if name.startswith(f"{path}.")
        }
        kind = (type(block), *sorted(mine))  # names alone: kernels of every scheme are tested by themselves
        if kind in kinds or not mine:
            continue
        if entered.calls[number].left_out:
            notes.append(_untried(path, SourceError("the model leaves it out for text")))
            continue
        kinds.add(kind)
        try:
            call = entered.calls[number]
            for before in range(number):
                call = handed(call, before, rests.get(before))
            rests[number] = _try(path, block, mine, entered.states, call=call)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001, a block that needs what another one leaves behind
            notes.append(_untried(path, error))
    return tuple(notes)


def _try(
    path: str, block: nn.Module, stored: Mapping[str, StoredLayer], states: Tensor, *, call: Call
) -> tuple[Any, ...] | None:
    """Try one block; returns what it hands on. Raises `SourceError` as `try_blocks`, or what its float form raises."""
    size = sum(parameter.numel() for parameter in block.parameters())  # of two experts
    if size > LARGEST:
        raise ValueError(f"{size / 1e9:.1f}B weights are too many")
    try:
        found, rest = _apart(block, stored, states, call, seed=0)
        if not found <= APART:  # a router may choose another expert by chance, not twice
            found = _apart(block, stored, states, call, seed=1)[0]
    except _Failed as failed:
        raise SourceError(
            f"{path} ({type(block).__name__}) runs as floats and not when it is packed ({failed}); leave the layer that it "
            "names float (--keep), and report the model"
        ) from failed
    if not found <= APART:
        raise SourceError(
            f"{path} ({type(block).__name__}) gives other numbers when it is packed ({found:.1%} apart): its code does more "
            "with a linear than to call it; find it with --keep, and report the model"
        )
    return rest


class _Failed(Exception):
    """A packed block that did not run."""


def _untried(what: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:120]
    return (
        f"{what} could not be tried before the run: {reason}"
        if isinstance(error, FracbitError)
        else (f"{what} could not be tried before the run ({type(error).__name__}: {reason})")
    )


def _ids(model: PreTrainedModel) -> Tensor:
    size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (1, TOKENS), generator=generator)  # [1, tokens]


def _apart(
    block: nn.Module, stored: Mapping[str, StoredLayer], states: Tensor, call: Call, *, seed: int
) -> tuple[float, tuple[Any, ...] | None]:
    """How far a block's packed output is from that of the decoded floats, relative to the latter; and what it hands on."""
    alone, generator = deepcopy(block), torch.Generator().manual_seed(seed)
    for module in alone.modules():
        fill(module, generator)
    packed = dict(_packed(alone, stored))
    with torch.no_grad():
        floats = run(alone, states, call)
        for name, module in packed.items():
            replace(alone, name, module)
        decode_for_code(alone)
        try:
            found = run(alone, states, call).states.float()
        except Exception as error:  # code of any model
            raise _Failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error
    wanted = floats.states.float()
    exact = all(one.inputs is None and not one.rotated for one in stored.values())
    if not bool(torch.isfinite(wanted).all()):
        raise ValueError("random values overflow in its float form")
    if not exact and bool(torch.isfinite(found).all()):  # inputs are rounded too, or bases turned: it ran
        return 0.0, floats.rest
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12)), floats.rest


def _packed(block: nn.Module, stored: Mapping[str, StoredLayer]) -> Iterator[tuple[str, nn.Module]]:
    """The packed modules of a block's linears, whose floats become what they decode to."""
    done: dict[int, Any] = {}
    for name, layer in stored.items():
        linear = block.get_submodule(name)
        if id(linear) in done:  # an expert that stands for others
            yield name, done[id(linear)]
            continue
        columns = torch.arange(layer.outliers) if layer.outliers else None
        held = quantize_tensor(weight_of(linear).float(), layer.scheme, columns=columns)
        set_weight(linear, decode(held))
        module = packed_module(linear, layer)
        module.fill(held)
        if module.bias is not None:
            module.bias = linear.bias
        done[id(linear)] = module
        yield name, module
