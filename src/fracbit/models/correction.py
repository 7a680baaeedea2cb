"""What a correction is: after a block is quantized, it is moved so that it gives what the float block gave.

To add one, write its file and a line in records/tables.py. Norm tweaking (models/tweak.py) moves the norms alone; training
(models/train.py) moves everything that the block stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fracbit.errors import RecipeError
from fracbit.models.blocks import norms
from fracbit.models.calls import device_of
from fracbit.models.family import Family
from fracbit.models.walk import Hidden, forward
from fracbit.numerics.packed import PackedTensor
from fracbit.numerics.stats import Stats
from fracbit.records import tables
from fracbit.records.named import read_named
from fracbit.records.progress import Progress
from fracbit.records.tables import Table


@dataclass(frozen=True, eq=False)
class Corrected:
    """What a correction bought: relative squared error of the block's output on held-out samples before and after, with tokens
    weighed as the correction does.

    `kept` says which variant stayed, `none` where no one helped. `packed`: the linears that it changed, by name.
    """

    before: float
    after: float
    kept: str
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a block is corrected with.

    - `entrance` and `exits` [samples, tokens, width]: the states that enter the block, and those that it should give.
    - `train` and `judge` number the batches to fit and to judge by.
    - `weights`: the float weights [out, in] of its linears by name; `packed`: what they are quantized to; `stats`: the
      statistics of their inputs, gram matrix included, by the first linear that reads them.
    - `depth`: 0 for the first block of the model, towards 1 for the last; `seed` of everything random; `kind`: the type that
      norms are stored in.
    """

    entrance: Hidden
    exits: Tensor
    train: Sequence[int]
    judge: Sequence[int]
    weights: Mapping[str, Tensor]
    packed: Mapping[str, PackedTensor]
    stats: Mapping[str, Stats]
    depth: float = 0.0
    seed: int = 0
    kind: torch.dtype = torch.float32


class Correction(Protocol):
    """A way to correct a block: a `Checked` record whose fields are the options of its word.

    - `follows`: what the block should give: "block", what it gave as a float block from the same states; "model", what the
      float model gives there, which undoes errors of the blocks before it too.
    - `tokens` that it takes at once; None: the calibration's own batches.
    """

    @property
    def follows(self) -> str:
        """What the block should give: "block" or "model"."""
        ...

    @property
    def tokens(self) -> int | None:
        """Tokens of a step."""
        ...

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Move the norms of the quantized `block` in place; linears that should change are returned packed."""
        ...


CORRECTIONS: Table[Callable[..., Correction]] = tables.CORRECTIONS


def correction(word: str) -> Correction:
    """The correction of a word such as `closed` or `train:epochs=4`.

    Raises `RecipeError` for an unknown name, an unknown option and a value that the option does not take.
    """
    named = read_named(word, CORRECTIONS)
    found = CORRECTIONS.load(named.name)(**dict(named.options))
    if found.follows not in ("block", "model"):
        raise RecipeError(f"correction {word} follows {found.follows!r}; it can follow block or model")
    return found


def error(
    block: nn.Module,
    evidence: Evidence,
    values: Mapping[str, Tensor] | None = None,
    weigh: Callable[[Tensor], Tensor | float] = lambda wanted: 1.0,
) -> float:
    """Squared error of the block's output on the held-out batches, relative to that of passing its input on as it is.

    `values`: parameters by name that stand in for the block's own; `weigh`: from wanted states to the weight of each token.
    """
    wrong = added = 0.0
    for number in evidence.judge:
        batch = evidence.entrance.batches[number]
        entrance, wanted = (
            x[batch.start : batch.stop].float() for x in (evidence.entrance.states, evidence.exits)
        )
        with torch.no_grad():
            found = run_batch(block, evidence, number, values).float().to(wanted.device)
        weight = weigh(wanted)  # [samples, tokens, 1]
        wrong += float(((found - wanted).square() * weight).sum())
        added += float(((wanted - entrance).square() * weight).sum())
    return wrong / added if added > 0 else 0.0


def run_batch(
    block: nn.Module, evidence: Evidence, number: int, values: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What the block gives for a batch: [samples, tokens, width]; differentiable in the `values` of its parameters."""
    hidden = evidence.entrance
    batch = hidden.batches[number]
    states, call = hidden.states[batch.start : batch.stop], batch.calls[hidden.index]
    if not values:
        return forward(block, states, call)
    device = device_of(block)  # now, while its parameters are there
    places = {name: block.get_submodule(name.rpartition(".")[0]) for name in values}
    held = {name: module._parameters.pop(name.rpartition(".")[2]) for name, module in places.items()}
    try:
        for name, module in places.items():
            object.__setattr__(module, name.rpartition(".")[2], values[name])
        return forward(block, states, call, device)
    finally:
        for name, module in places.items():
            object.__delattr__(module, name.rpartition(".")[2])
            module._parameters[name.rpartition(".")[2]] = held[name]


def norm_parameters(block: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """Gains and biases of a block's norms, by their names inside the block."""
    return {
        f"{norm.name}.{leaf}": parameter
        for norm in norms(block, family)
        for leaf, parameter in block.get_submodule(norm.name).named_parameters(recurse=False)
    }


class Tuned:
    """A norm's parameter times a learned factor, or plus a learned shift where it may be 0 (biases)."""

    def __init__(self, parameter: Tensor, kind: torch.dtype) -> None:
        """`parameter` [width] itself is not written to before `store`; its values are rounded to `kind`."""
        self.parameter, self.kind = parameter, kind
        self.start = parameter.detach().float().clone()  # [width]
        self.unit = self.start.abs().clamp(min=float(self.start.abs().mean()) * 0.1 + 1e-8)  # [width]
        self.change = torch.zeros_like(self.start, requires_grad=True)  # [width], in units of `unit`

    def value(self) -> Tensor:
        """The parameter's present value, differentiable, rounded as it will be stored and in its own type."""
        return (self.start + self.change * self.unit).to(self.kind).to(self.parameter.dtype)

    def store(self) -> None:
        """Give the parameter its present value."""
        with torch.no_grad():
            self.parameter.copy_(self.value())
