"""The functions of the native module with arguments that do not belong: an exception or a result, never a signal."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chaos.trials import Change
from fracbit.kernels.cpu import NATIVE

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
        "multiply_each": ([weight, weight], x, y, [2, 1], False, 1),
        "read": (torch.zeros(100, dtype=torch.uint8), 1),
        "add_gram": (torch.randn(4, 8).bfloat16(), torch.zeros(8, 8), 1),
        "attend_causal": (heads, heads.clone(), heads.clone(), torch.empty(1, 2, 5, 16), 0.25, 1),
        **arguments_of_a_program(),
        "allow_threads_of_torch": (True,),
        "on_threads_of_torch": (),
        "abi": (),
        "instruction_sets": (),
        "instruction_set": (),
        "choose_instruction_set": (NATIVE.instruction_set(),),
        "has_gram": (),
        "has_causal": (),
    }


def a_program() -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """A decode step of every operation, and their arguments: a vocabulary of 20, 4 heads on 2 key heads, 4 experts."""
    made = NATIVE.Program(20, False)
    x, k, wide = ((made.register(width), 0) for width in (32, 16, 64))
    whole, queries, keys = (*x, 1, 32, 1, 32, 0), (*x, 4, 8, 4, 8, 0), (*k, 2, 8, 2, 8, 0)
    table, square, key_layer = ((torch.ones(rows, 32), None) for rows in (20, 32, 16))
    packed = (NATIVE.PackedWeight(*PACKED), torch.ones(5))
    silu, plain = ("silu", 0.0, 0.0), ("identity", 0.0, 0.0)
    arguments: dict[str, tuple[Any, ...]] = {
        "embed": (table, x, 1.0),
        "positions": (table, x, 2),
        "norm": (whole, whole, torch.ones(32), None, 1e-5, False),
        "linear": ([key_layer, packed], x, [k, wide], plain),
        "rotate": (keys, 0, 8),
        "spread": (x, x, [torch.ones(8, 8), torch.ones(4, 4)]),
        "round": (x, x, 32, 16, torch.arange(5.0), torch.arange(4.0) + 0.5, 0.0, 4.0, 0.0),
        "attend": (queries, keys, keys, x, 1.0, 0.0, 4, 0, torch.zeros(4)),
        "activate": (x, 32, silu),
        "gate": (x, wide, 32, silu),
        "add": (x, wide, 32, 1.0, 1.0),
        "scale_by": (k, x, 32),
        "route": (k, 4, 2, True),
        "experts": ([[square] * 4], x, [wide], False),
        "mix": (wide, x, 32),
    }
    for name, given in arguments.items():
        getattr(made, name)(*given)
    made.linear([table], x, [(0, 0)], plain)
    return made, arguments


def arguments_of_a_program() -> dict[str, tuple[Any, ...]]:
    """As `arguments_of`, of a decode step."""
    (made, arguments), (whole, _) = a_program(), a_program()
    turns = (torch.ones(16, 8), torch.zeros(16, 8))
    codes, keys = torch.zeros(1, 3, 2, 5, 2, 8, dtype=torch.uint8), torch.ones(1, 3, 2, 5, 1, 8)
    values = torch.ones(1, 3, 2, 5, 2, 1)
    step = (
        torch.zeros(1, 2, 3, 2, 16, 8), 4, [codes, keys, keys, codes, values, values], 8, torch.tensor([0, 19, 5]),
        torch.zeros(3).long(), [turns], [torch.zeros(4, 16)], torch.zeros(3, 20), 1,
    )  # fmt: skip
    return {
        "Program": (20, False),
        "Program.register": (made, 8),
        **{f"Program.{name}": (made, *given) for name, given in arguments.items()},
        "Program.advance": (whole, *step),
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
        if name.startswith("_") or not callable(entry):
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
    if isinstance(value, list | tuple) and chance.random() < 0.8:
        changed = list(value)
        if changed:
            place = chance.randrange(len(changed))
            changed[place] = chance.choice((None, other(chance, changed[place]), 3))
        return type(value)(chance.choice((changed, changed, changed[:-1], [*changed, None], [])))
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
            before = NATIVE.instruction_set()
            refused = sum(_is_refused(name, arguments) for name, arguments in calls)
            NATIVE.choose_instruction_set(before)
            return f"refused: {refused} of {CALLS}" if refused else "unharmed: "

        return ", ".join(name for name, _ in calls), judge

    return change


def _is_refused(name: str, arguments: list[Any]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nanobind's, for an object that was never made
        try:
            function(name)(*arguments)
        except REFUSALS:
            return True
    return False
