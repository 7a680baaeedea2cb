"""A pretended accelerator for machines without one: tensors that say they are elsewhere and refuse to meet those that are not.

Values stay on the CPU, so that results can be compared bit for bit; what is checked is what a real device would refuse: an
operation on tensors of two devices. Copies between devices and indexing by CPU indices are allowed, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cpu:0")  # not equal to "cpu", and torch has what it needs to guard it
CROSSING = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put_")
Seen = dict[str, int]


class Away(torch.Tensor):
    """A tensor on `DEVICE`; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            dispatch_device=True,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, {})


class Pretend(TorchDispatchMode):
    """Sees every operation, those that make tensors on `DEVICE` included; `seen` counts the ones that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self.seen)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any], seen: Seen) -> Any:
    if func is torch.ops.prim.device.default:
        return DEVICE if isinstance(args[0], Away) else args[0].device
    name = func._schema.name
    tensors = [x for x in flat((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Away)]
    if away and name not in CROSSING:
        strict = tensors[:1] + tensors[-1:] if name in INDEXING else tensors
        here = [x for x in strict if not isinstance(x, Away) and x.dim() > 0 and x.dtype != torch.bool]
        if here and not (name in INDEXING and here == tensors[-1:]):
            raise RuntimeError(f"{name}: expected all tensors on {DEVICE}, found one on {here[0].device}")
    target = kwargs.get("device")
    kwargs = {**kwargs, "device": torch.device("cpu")} if _is_there(target) else kwargs
    result = func(*plain(args), **{key: plain(value) for key, value in kwargs.items()})
    written = [i for i, argument in enumerate(func._schema.arguments) if argument.alias_info is not None]
    for i in written:
        if func._schema.arguments[i].alias_info.is_write and i < len(args):
            seen[name] = seen.get(name, 0) + isinstance(args[i], Away)
            return args[i]
    there = _is_there(target) if target is not None else bool(away)
    if not there:
        return result
    seen[name] = seen.get(name, 0) + 1
    return wrapped(result)


def flat(value: Any) -> list[Any]:
    """The leaves of tuples and lists."""
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, tuple | list) else [value]


def plain(value: Any) -> Any:
    """The same arguments with tensors that hold the values."""
    if isinstance(value, tuple | list):
        return type(value)(plain(part) for part in value)
    return value.inner if isinstance(value, Away) else value


def wrapped(value: Any) -> Any:
    """The same results, on `DEVICE`."""
    if isinstance(value, tuple | list):
        return [wrapped(part) for part in value]
    return Away(value) if isinstance(value, torch.Tensor) else value


def _is_there(target: Any) -> bool:
    return target is not None and torch.device(target) == DEVICE


@contextmanager
def accelerator() -> Iterator[Seen]:
    """`DEVICE` exists while this is open; gives the operations that ran there, counted."""
    with Pretend() as mode:
        yield mode.seen
