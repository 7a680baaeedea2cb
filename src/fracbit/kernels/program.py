"""`NativeProgram`: the decode step of a model as a list of operations, run by one native call a token.

At batch 1 a decode step of a small model spends more time between its products than in them. Here no part of it is Python:
threads work through the whole list as one job, linears that read one input share its rounding, and attention reads the cache
where it lies. Sums are fp32 throughout, so logits are at least as exact as those of a model in 16 bits. The native code is
`native/step.cpp` and `native/operations.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fracbit.errors import KernelError
from fracbit.kernels import cpu
from fracbit.kernels.kernel import Activations
from fracbit.kernels.linear import PackedLinear

Weight: TypeAlias = PackedLinear | Tensor
"""Packed, or floats [rows, columns]."""
Biased: TypeAlias = tuple[Weight, Tensor | None]
"""A weight and its bias [rows]."""
LOGITS = 0
"""The register that takes the logits."""


@dataclass(frozen=True)
class Span:
    """`width` numbers of a register from `offset` on. A register holds rows of fp32 numbers, one for each sequence."""

    register: int
    offset: int
    width: int

    @property
    def at(self) -> tuple[int, int]:
        """Where it begins."""
        return self.register, self.offset


@dataclass(frozen=True)
class HeadSpans:
    """`count` heads of `size` numbers in a register: groups of `per_group`, `step` apart, the groups `stride` apart."""

    register: int
    offset: int
    count: int
    size: int
    per_group: int
    step: int
    stride: int

    @property
    def at(self) -> tuple[int, ...]:
        """As the native module takes them."""
        return (
            self.register, self.offset, self.count, self.size, self.per_group, self.step, self.stride,
        )  # fmt: skip


def in_a_row(span: Span, count: int) -> HeadSpans:
    """`count` heads, one after another."""
    size = span.width // count
    return HeadSpans(span.register, span.offset, count=count, size=size, per_group=count, step=size, stride=0)


@dataclass(frozen=True)
class Elementwise:
    """What numbers go through one by one: activations, `cap` (a tanh(x / a)), and the gate `clamped` of gpt-oss."""

    name: Literal[
        "identity", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "cap", "clamped"
    ] = "identity"  # fmt: skip
    a: float = 0.0
    b: float = 0.0

    @property
    def native(self) -> tuple[str, float, float]:
        """As the native module takes it."""
        return self.name, self.a, self.b


PLAIN = Elementwise()


@dataclass(frozen=True, eq=False)
class InputRounding:
    """How numbers are rounded: to `values` [levels], `step` apart or, where that is 0, cut at `boundaries` [levels - 1].

    `scale`: of the values, or 0 where the largest magnitude of `group` numbers (0: all) comes to lie at `end`.
    """

    values: Tensor
    boundaries: Tensor
    step: float
    end: float
    group: int
    scale: float


@dataclass(frozen=True, eq=False)
class Tables:
    """What depends on positions [room]: cosines and sines [room, turned] of every rotation, and what is added to the scores of
    the heads [heads, room].
    """

    rotations: Sequence[tuple[Tensor, Tensor]] = ()
    biases: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Older:
    """Tokens before those of a store, as codes of 8 or 4 bits: `parts` are codes, lows and steps of keys, then of values.

    Codes uint8 [attentions, batch, kv_heads, groups, group, head * bits / 8]; ranges with 1 instead of `group` for keys, of
    `head` for values.
    """

    bits: int = 8
    parts: Sequence[Tensor] = ()


NOTHING = Older()


class NativeProgram:
    """Operations that are run one token at a time. Weights are shared with the caller, who must not write to them afterwards.

    Every method adds an operation. All raise `KernelError` when a part does not fit or the native module is not there.
    """

    def __init__(self, vocabulary: int, activations: Activations, isa: str = "") -> None:
        if cpu.NATIVE is None:
            raise KernelError(cpu.NOTE)
        self.vocabulary = vocabulary
        self._native: Any = self._checked(cpu.NATIVE.Program, vocabulary, activations == "int8", isa)

    def register(self, width: int) -> Span:
        """A new register."""
        return Span(self._checked(self._native.register, width), 0, width)

    def embed(self, table: Weight, to: Span, factor: float) -> None:
        """`to` = rows of `table` [vocabulary, width] for the tokens, times a factor."""
        self._checked(self._native.embed, (self._weight(table), None), to.at, factor)

    def add_positions(self, table: Weight, to: Span, offset: int) -> None:
        """`to` += rows of `table` [offset + positions, width] for the positions."""
        self._checked(self._native.positions, (self._weight(table), None), to.at, offset)

    def normalize(
        self, source: HeadSpans, to: HeadSpans, gain: Tensor | None, bias: Tensor | None, epsilon: float, centered: bool
    ) -> None:  # fmt: skip
        """Norms of heads; `centered`: layer norms, which take the mean off, instead of RMS norms."""
        self._checked(
            self._native.norm, source=source.at, to=to.at, gain=self._floats(gain), bias=self._floats(bias), epsilon=epsilon,
            centered=centered,
        )  # fmt: skip

    def multiply(
        self, layers: Sequence[Biased], source: Span, to: Sequence[Span], after: Elementwise = PLAIN
    ) -> None:
        """Products of layers that read the same numbers, and a curve that the results go through."""
        self._checked(
            self._native.linear, layers=[*map(self._layer, layers)], source=source.at, to=[part.at for part in to],
            after=after.native,
        )  # fmt: skip

    def spread(self, source: Span, to: Span, factors: Sequence[Tensor]) -> None:
        """`to` = `source` times the matrix with these Kronecker factors [size, size] each."""
        _same(source, to)
        self._checked(self._native.spread, source.at, to.at, [self._floats(factor) for factor in factors])

    def round(self, source: Span, to: Span, table: InputRounding) -> None:
        """`to` = `source` rounded to a table."""
        self._checked(
            self._native.round, source.at, to.at, width=_same(source, to), group=table.group or source.width,
            values=self._floats(table.values), boundaries=self._floats(table.boundaries), step=table.step,
            end=table.end, scale=table.scale,
        )  # fmt: skip

    def turn(self, heads: HeadSpans, rotation: int, count: int) -> None:
        """Turn the first `count` numbers of each head by the rotation of that number in `Tables`."""
        self._checked(self._native.rotate, heads.at, rotation, count)

    def attend(
        self, states: Sequence[HeadSpans], to: Span, scale: float, *, cap: float = 0.0, window: int = 0, bias: int = -1,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keep keys and values of `states` (queries, keys, values), then attend: softmax(cap(scale q k) + bias) v.

        `window`: the newest tokens that are seen, 0 for all; `bias`: a number in `Tables`; `sinks` [heads]: scores without
        a value.
        """
        queries, keys, values = (part.at for part in states)
        self._checked(
            self._native.attend, queries=queries, keys=keys, values=values, to=to.at, scale=scale, cap=cap, window=window,
            biases=bias, sinks=self._floats(sinks),
        )  # fmt: skip

    def activate(self, at: Span, curve: Elementwise) -> None:
        """Numbers through a curve, in place."""
        self._checked(self._native.activate, at.at, at.width, curve.native)

    def gate(self, gate: Span, up: Span, curve: Elementwise) -> None:
        """`gate` = curve(gate) * up."""
        self._checked(self._native.gate, gate.at, up.at, width=_same(gate, up), curve=curve.native)

    def add(self, source: Span, to: Span, factor: float = 1.0, keep: float = 1.0) -> None:
        """`to` = keep * to + factor * source."""
        self._checked(self._native.add, source.at, to.at, width=_same(source, to), keep=keep, factor=factor)

    def scale_by(self, source: Span, to: Span) -> None:
        """`to` *= the one number of `source`."""
        self._checked(self._native.scale_by, source.at, to.at, to.width)

    def route(self, logits: Span, top: int, among: bool) -> None:
        """Choose `top` experts. Their shares are a softmax over all logits, or (`among`) over those of the chosen ones."""
        self._checked(self._native.route, logits.at, experts=logits.width, top=top, among=among)

    def run_experts(
        self, layers: Sequence[Sequence[Biased]], source: Span, to: Sequence[Span], apart: bool
    ) -> None:
        """Layers [which][expert] of the experts that were chosen. `apart`: each reads numbers of its own in `source`."""
        native = [[*map(self._layer, of_all)] for of_all in layers]
        places = [part.at for part in to]
        self._checked(self._native.experts, native, source.at, to=places, apart=apart)

    def mix(self, source: Span, to: Span) -> None:
        """`to` = what the chosen experts found in `source`, each by its share."""
        self._checked(self._native.mix, source.at, to.at, to.width)

    def advance(
        self, store: Tensor, held: int, tokens: Tensor, pads: Tensor, *, tables: Tables, older: Older = NOTHING
    ) -> Tensor:  # fmt: skip
        """Read `tokens` [batch] after `older` ones and the `held` ones of `store`; fp32 logits [batch, vocabulary].

        `store` [attentions, 2, batch, kv_heads, room, head] takes the new keys and values; the first `pads[n]` positions of
        sequence n are padding. Raises `KernelError` when something does not fit, or a weight was written to since.
        """
        logits = torch.empty(len(tokens), self.vocabulary)  # [batch, vocabulary]
        self._checked(
            self._native.advance, store, held, older=list(older.parts), bits=older.bits, tokens=tokens, pads=pads,
            rotations=tables.rotations, biases=tables.biases, logits=logits, threads=torch.get_num_threads(),
        )  # fmt: skip
        return logits

    def _checked(self, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return call(*given, **named)
        except (ValueError, TypeError) as error:
            raise KernelError(f"the native step does not take this: {error}") from None

    def _layer(self, layer: Biased) -> tuple[Any, Tensor | None]:
        return self._weight(layer[0]), self._floats(layer[1])

    def _weight(self, weight: Weight) -> Any:
        if isinstance(weight, Tensor):
            return weight.detach().contiguous()
        if not isinstance(weight.prepared, cpu.CpuWeight):
            raise KernelError(
                f"a weight runs on the kernel {weight.kernel.name}; a native step needs weights of the kernel cpu"
            )
        return weight.prepared.weight

    def _floats(self, part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().float().contiguous()


def _same(one: Span, other: Span) -> int:
    if one.width != other.width:
        raise KernelError(f"{one.width} numbers do not fit {other.width}")
    return one.width
