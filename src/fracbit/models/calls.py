"""Calling a block as its model does: its arguments, recorded, moved and compared, and a way out of a forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """What a module is called with. For a block the hidden states are left out; they come first.

    `axis` says where the samples are in the states that the module takes (1: Gemma 3n has several states a sample in front).
    `left_out`: the model does not call the block for text; the states pass by it.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axis: int = 0
    left_out: bool = False


@dataclass(frozen=True)
class HandedOn:
    """Stands for value `number` of what block `block` returns beside its states, which a later block is called with."""

    block: int
    number: int


class Stop(Exception):
    """Raised inside a forward that has served its purpose."""


@contextmanager
def until_stopped() -> Iterator[None]:
    """Run a forward up to the point where something raises `Stop`."""
    with suppress(Stop):
        yield


@dataclass(frozen=True)
class Returned:
    """What a block returned: its states [samples, tokens, width], and what else came with them (None: it returned no tuple)."""

    states: torch.Tensor
    rest: tuple[Any, ...] | None


def run(block: nn.Module, states: torch.Tensor, call: Call, device: torch.device | None = None) -> Returned:
    """Call a block with states [samples, tokens, width], on `device`, by default where the block is."""
    device = device or device_of(block)
    if call.left_out:
        return Returned(states.to(device), None)
    args, kwargs = move(call.args, device), move(dict(call.kwargs), device)
    result = block(states.to(device).movedim(0, call.axis), *args, **kwargs)
    rest = tuple(result[1:]) if isinstance(result, (tuple, list)) else None
    return Returned(first_of(result).movedim(call.axis, 0), rest)


def first_of(result: Any) -> torch.Tensor:
    """The states among what a module returns: the result itself or the first of several."""
    first: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return first


def handed(value: Any, block: int, rest: tuple[Any, ...] | None) -> Any:
    """`value`, arguments of a call, with what `block` returned in the places that stand for it; None where it is not known."""
    if isinstance(value, HandedOn):
        if value.block != block:
            return value
        return None if rest is None else rest[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(handed(item, block, rest) for item in value)
    if isinstance(value, dict):
        return {name: handed(item, block, rest) for name, item in value.items()}
    if isinstance(value, Call):
        return replace(
            value, args=handed(value.args, block, rest), kwargs=handed(dict(value.kwargs), block, rest)
        )
    return value


def device_of(module: nn.Module | None) -> torch.device:
    """Where a module's tensors are; the CPU for a module without any."""
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def move(value: Any, device: torch.device) -> Any:
    """The same arguments with every tensor on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(move(item, device) for item in value)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    return value


def without_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """Split what a block is called with into the hidden states and the rest."""
    if args:
        return args[0], Call(tuple(args[1:]), kwargs)
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], Call((), {key: value for key, value in kwargs.items() if key != name})


def equal(one: Any, other: Any) -> bool:
    """Whether two sets of arguments are the same; objects of unknown types are only equal to themselves."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return isinstance(one, (bool, int, float, str, HandedOn)) and one == other
