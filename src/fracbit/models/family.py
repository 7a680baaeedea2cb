"""What fracbit must know of an architecture, as data: a `Family` says where the blocks are, which linears
read one input, which norms and linears produce it, and by which module's output they are judged.

All names are module paths: those of `Family` itself from the model's root, those of its groups, norms, pairs
and sublayers from a block's root. A name that a block does not hold is skipped (a Qwen-MoE model has dense and
sparse blocks); `*` stands for every expert of a mixture. No code branches on a family's name: what differs is
written here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Condition: TypeAlias = tuple[str, tuple[object, ...]]
"""A config attribute and the values it may have, such as `("parallel_attn", (True,))`."""


@dataclass(frozen=True)
class Norm:
    """A normalization inside a block and the linears that read its output.

    `exclusive` says that nothing but the readers sees the output, so that gain (and bias) may be multiplied
    by `s` and the readers' input columns divided by it without changing the model. It is false where the
    residual stream takes the output.
    """

    name: str
    readers: tuple[str, ...] = ()
    exclusive: bool = True


@dataclass(frozen=True)
class Pair:
    """A linear with output channels that reach the input channels of other linears through nothing but a
    scale-free step.

    `layout` says which output row feeds which input column: `rows` the last rows in order (the up half of a
    fused gate_up), `values last` the value heads after queries and keys (or alone), `values by head` groups
    of `[queries..., key, value]`. `kv_heads` is the config attribute that counts key-value heads; None: as
    many as heads.
    """

    source: str
    readers: tuple[str, ...]
    layout: Literal["rows", "values last", "values by head"] = "rows"
    kv_heads: str | int | None = None
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Sublayer:
    """The modules, applied in this order, by the output of which a change of `linears` is judged (AdaDim,
    arXiv:2309.15531, Eq. 1).
    """

    modules: tuple[str, ...]
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture, or one variant of it.

    Attributes:
        name: the family's own name, unique in `FAMILIES`.
        model_types: the `model_type` values of Hugging Face configs that it covers.
        blocks: path of the list of repeated blocks.
        embeddings: paths of the embedding tables, the token table first.
        head: path of the output projection.
        linears: groups of linears that read one and the same input, in order of use.
        sublayers: modules by the output of which linears are judged; a linear in none is judged by its own.
        norms: norms inside a block, with the linears that read each.
        pairs: linears whose output is, channel for channel, the input of others.
        final_norm: path of the norm before the head, "" where there is none.
        gain_offset: what the norms add to the stored gain (Gemma stores `gain - 1`).
        keep_float: linears inside a block that stay float (routers, gates with one output), with the reason.
        when: config values that select this variant; the first family in `FAMILIES` that fits is taken.
        note: what to tell the user, for families found by structure.

    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: tuple[str, ...]
    head: str
    linears: tuple[tuple[str, ...], ...]
    sublayers: tuple[Sublayer, ...] = ()
    norms: tuple[Norm, ...] = ()
    pairs: tuple[Pair, ...] = ()
    final_norm: str = ""
    gain_offset: float = 0.0
    keep_float: Mapping[str, str] = field(default_factory=dict)
    when: tuple[Condition, ...] = ()
    note: str = ""


def fits(conditions: Sequence[Condition], config: Any) -> bool:
    """Whether a config (`transformers.PreTrainedConfig`) has an allowed value for every condition."""
    return all(getattr(config, attribute, None) in allowed for attribute, allowed in conditions)
