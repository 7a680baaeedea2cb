"""What a decode step computes, as data: a `Blueprint` lists the operations before, in and after a model's blocks.

Operations read and write named registers: rows of numbers, one row for each sequence. `x` is the residual stream. The width of
a register is that of what is first written to it. Module paths are those of a block, and before and after the blocks those of
the model. A module that a block does not hold is left out where its operation works in place (the norms of queries in Llama's
block); elsewhere `Either` says what stands in its place. No code branches on a model type: what differs is written here.

step.py turns a blueprint and a model into a native program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fracbit.models.family import Condition


@dataclass(frozen=True)
class Embed:
    """`x` = rows of a table for the tokens, times what the module or the config (`factor`, an attribute) says."""

    module: str
    factor: str = ""
    to: str = "x"


@dataclass(frozen=True)
class Positions:
    """`x` += rows of a table of learned positions, which begin at the module's `offset`."""

    module: str


@dataclass(frozen=True)
class Normalize:
    """A norm of all numbers of a register, or, where its gain is shorter, of each part as long as it."""

    module: str
    source: str = "x"
    to: str = "n"


@dataclass(frozen=True)
class Multiply:
    """Linears that read one register. `after`: the module of the activation that the results go through."""

    modules: tuple[str, ...]
    source: str
    to: tuple[str, ...]
    after: str = ""


@dataclass(frozen=True)
class Split:
    """Names for parts of a register: `halves`; `stacked` queries, keys and values; or `groups` [queries..., key, value].

    `kv_heads`: the config attribute that counts key heads, or their number.
    """

    source: str
    to: tuple[str, ...]
    layout: Literal["halves", "stacked", "groups"]
    kv_heads: str | int = "num_attention_heads"


@dataclass(frozen=True)
class Attend:
    """Attention of `q` to what is held and to the new `k` and `v`, by heads; queries and keys are turned first.

    `module` knows the scale, and sinks where there are some. `window`: which layers see the newest tokens alone, all or those
    that `layer_types` says. `alibi`: positions are added to the scores, as they are or times the scale of the scores. `cap`:
    the config attribute of a soft cap. `repeated`: the cache holds a copy of keys and values for every query head.
    """

    module: str
    kv_heads: str | int = "num_key_value_heads"
    turned: bool = True
    window: Literal["", "all", "layer_types"] = ""
    alibi: Literal["", "plain", "scaled"] = ""
    cap: str = ""
    repeated: bool = False
    to: str = "a"


@dataclass(frozen=True)
class GateBy:
    """`gate` = activation(gate) * up, in place."""

    activation: str
    gate: str = "gate"
    up: str = "up"


@dataclass(frozen=True)
class AddTo:
    """`to` += source, times the config attribute `factor` where it exists; `anew` forgets what `to` held."""

    source: str
    to: str = "x"
    factor: str = ""
    anew: bool = False


@dataclass(frozen=True)
class WeighBy:
    """`to` *= sigmoid of the one number of `source`."""

    source: str
    to: str


@dataclass(frozen=True)
class RunExperts:
    """`to` = what the experts of a block make of `source`, chosen by `router`."""

    router: str
    experts: str
    source: str = "n"
    to: str = "m"


@dataclass(frozen=True)
class Either:
    """What a block does that holds a module, and what one does that does not."""

    module: str
    held: tuple[Operation, ...]
    other: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Head:
    """Logits: a linear, divided by and capped at the config attributes named, where these exist."""

    module: str
    source: str = "n"
    divisor: str = ""
    cap: str = ""


Operation: TypeAlias = (
    Embed | Positions | Normalize | Multiply | Split | Attend | GateBy | AddTo | WeighBy | RunExperts | Either | Head
)  # fmt: skip


@dataclass(frozen=True)
class Blueprint:
    """The decode step of some model types, or of one variant of them.

    Attributes:
        model_types: the `model_type` values of Hugging Face configs that it covers.
        before: what happens to a token before the blocks.
        block: what a block does.
        after: from the stream to the logits.
        rotary: the module that makes cosines and sines, "" where there is none.
        when: config values that select this variant; the first blueprint in `BLUEPRINTS` that fits is taken.
        only: config values without which the step would compute something else, and what to call them.

    """

    model_types: tuple[str, ...]
    before: Sequence[Operation]
    block: Sequence[Operation]
    after: Sequence[Operation]
    rotary: str = ""
    when: tuple[Condition, ...] = ()
    only: tuple[Condition, ...] = field(default=())
