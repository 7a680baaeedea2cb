"""The functions of the native module with arguments that do not belong: an exception or a result, never a signal."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chaos.trials import Change
from fracbit.kernels.cpu import NATIVE

LEFT_ALONE = ("Decoder",)
"""The decoder of the native step has a fuzz of its own: tests/models/test_step.py."""
REFUSALS = (TypeError, ValueError, RuntimeError, BufferError, OverflowError, MemoryError)
CALLS = 12  # of one trial


def arguments_of() -> dict[str, tuple[Any, ...]]:
    """Arguments of every entry point with which it runs."""
    weight = NATIVE.PackedWeight(*PACKED)
    x, y = torch.randn(3, 32), torch.empty(3, 5)
    heads = torch.randn(1, 2, 5, 16)
    return {
        "PackedWeight": PACKED,
        "PackedWeight.multiply": (weight, x, y, False, 1),
        "PackedWeight.decode": (weight, 0, torch.empty(5, 32), 1),
        "multiply_together": ([weight, weight], x, [y, y.clone()], True, 1),
        "read": (torch.zeros(100, dtype=torch.uint8), 1),
        "add_gram": (torch.randn(4, 8).bfloat16(), torch.zeros(8, 8), 1),
        "attend_causal": (heads, heads.clone(), heads.clone(), torch.empty(1, 2, 5, 16), 0.25, 1),
        "allow_threads_of_torch": (True,),
        "on_threads_of_torch": (),
        "abi": (),
        "instruction_sets": (),
        "has_gram": (),
        "has_causal": (),
    }


PACKED: tuple[Any, ...] = (
    5, 32, 4, "in", 8, torch.randint(0, 256, (5, 16), dtype=torch.uint8), torch.ones(5, 4), None, None,
    torch.linspace(-1, 1, 16)[None], None, None,
)  # fmt: skip


def entry_points() -> set[str]:
    """Every function of the module and every method of its classes that Python can call."""
    found = set()
    for name in dir(NATIVE):
        entry = getattr(NATIVE, name)
        if name.startswith("_") or name in LEFT_ALONE or not callable(entry):
            continue
        found.add(name)
        if isinstance(entry, type):
            inner = [
                each for each in dir(entry) if not each.startswith("_") and callable(getattr(entry, each))
            ]
            found |= {f"{name}.{each}" for each in inner}
    return found


def function(name: str) -> Callable[..., Any]:
    """An entry point by its name."""
    owner, _, method = name.partition(".")
    held = getattr(NATIVE, owner)
    return getattr(held, method) if method else held


def other(chance: random.Random, value: Any) -> Any:
    """What Python might hand over instead of a value."""
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        return _other_tensor(chance, value)
    if isinstance(value, list) and chance.random() < 0.7:
        changed = list(value)
        if changed:
            place = chance.randrange(len(changed))
            changed[place] = chance.choice((None, other(chance, changed[place]), 3))
        return chance.choice((changed, changed[:-1], [*changed, None], []))
    unmade = NATIVE.PackedWeight.__new__(NATIVE.PackedWeight)
    return chance.choice((*PLAIN, object(), unmade, torch.tensor(1.0), np.zeros(3)))


PLAIN = (
    None, True, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**62, 2**63, 2**200, -(2**63), 0.5, float("nan"), "", "avx2", "x" * 9999, b"x",
    [], [None], {},
)  # fmt: skip
TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip


def _other_tensor(chance: random.Random, value: torch.Tensor) -> Any:
    made: Mapping[str, Callable[[], Any]] = {
        "type": lambda: value.to(chance.choice(TYPES)),
        "cut": lambda: value[:-1],
        "narrow": lambda: value[..., :-1],
        "empty": lambda: value[:0],
        "no width": lambda: value[..., :0],
        "more": lambda: value[None],
        "flat": lambda: value.reshape(-1),
        "turned": lambda: value.transpose(0, -1),
        "every second": lambda: torch.cat([value, value], -1)[..., ::2],
        "expanded": lambda: value[:1].expand(value.shape),
        "stretched": lambda: torch.zeros(*value.shape[:-1], value.shape[-1] * 1000, dtype=value.dtype),
        "meta": lambda: value.to("meta"),
        "gradient": lambda: value.float().requires_grad_(),
        "scalar": lambda: value.flatten()[0],
        "backwards": lambda: value.detach().float().numpy()[::-1],
        "unaligned": lambda: np.frombuffer(bytes(4 * value.numel() + 1), np.uint8)[1:].view(np.float32).reshape(value.shape),
        "read only": lambda: np.broadcast_to(np.float32(0), tuple(value.shape)),
        "big-endian": lambda: value.detach().float().numpy().astype(">f4"),
        "sparse": lambda: value.float().to_sparse(),
        "numbers": lambda: torch.full_like(value, chance.choice((0, 1, 255 if value.dtype == torch.uint8 else -1))),
    }  # fmt: skip
    return made[chance.choice(sorted(made))]()


def hostile_call(grounds: object) -> Change:
    """Calls of random entry points with one to three arguments that do not belong."""

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        known = arguments_of()
        calls = []
        for _ in range(CALLS):
            name = chance.choice(sorted(known))
            arguments = list(known[name])
            places = range(1 if "." in name else 0, len(arguments))
            for place in chance.sample(places, min(len(places), chance.choice((1, 1, 2, 3)))):
                arguments[place] = other(chance, arguments[place])
            calls.append((name, arguments))

        def judge() -> str:
            refused = sum(_is_refused(name, arguments) for name, arguments in calls)
            return f"refused: {refused} of {CALLS}" if refused else "unharmed: "

        return ", ".join(name for name, _ in calls), judge

    return change


def _is_refused(name: str, arguments: list[Any]) -> bool:
    try:
        function(name)(*arguments)
    except REFUSALS:
        return True
    return False
