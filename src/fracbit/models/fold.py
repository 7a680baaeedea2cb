"""Folding factors and rotations into a model's weights, so that its output stays the same.

A factor s on the inputs of some linears divides what produces them (a norm's gain and bias, or the rows of another linear) and
multiplies the columns that read them. A rotation R of the residual stream turns what writes it (embeddings, o, down) and what
reads it (the linears after the norms, the head); an RMSNorm commutes with R once its gain is folded into its readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fracbit.errors import RecipeError
from fracbit.models.blocks import (
    bias_of,
    blocks,
    find,
    gain_of,
    linears,
    norms,
    pairs,
    shape_of,
    source_rows,
    weight_of,
)
from fracbit.models.family import Family, Norm, Pair
from fracbit.models.install import set_weight
from fracbit.transforms.rotation import turn_inputs

ROWS = 8192  # turned at a time: an embedding table in fp64 would be four times its size


def storable(block: nn.Module, family: Family, norm: Norm, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors nearest to `factors` [width] that leave a gain which `dtype`, the checkpoint's type, holds exactly.

    Folding these costs no accuracy, even where gains are stored in 16 bits.
    """
    gain = gain_of(block, norm.name)
    assert gain is not None
    effect = gain.float() + family.gain_offset  # [width]
    left = (effect / factors - family.gain_offset).to(dtype).float() + family.gain_offset  # [width]
    return torch.where((left != 0) & (effect != 0), effect / left, 1.0)


def fold_norm(block: nn.Module, family: Family, norm: Norm, factors: Tensor) -> None:
    """Divide a norm's output by `factors` [width] and multiply the columns of all its readers.

    Raises `RecipeError` when the residual stream takes the output too.
    """
    if not norm.exclusive:
        raise RecipeError(
            f"the residual stream reads {norm.name} too in this family, so nothing can be folded into it; "
            "leave the transform out"
        )
    gain = gain_of(block, norm.name)
    assert gain is not None
    bias = bias_of(block.get_submodule(norm.name))
    with torch.no_grad():
        gain.copy_((gain.float() + family.gain_offset) / factors - family.gain_offset)
        if bias is not None:
            bias.copy_(bias.float() / factors)
    scale_columns(block, norm.readers, factors)


def fold_pair(block: nn.Module, pair: Pair, factors: Tensor, config: Any) -> None:
    """Divide the output rows of `pair.source` that feed its readers and multiply the readers' columns.

    `factors` [in of the readers] must be equal where one row feeds several columns (`tie`).
    """
    source = block.get_submodule(pair.source)
    rows = source_rows(block, pair, config).to(factors.device)  # [in of the readers]
    by_row = torch.ones(shape_of(source)[0], device=factors.device)  # [out of the source]
    by_row[rows] = factors
    set_weight(source, weight_of(source).float() / by_row[:, None])  # [out, in]
    bias = bias_of(source)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(bias.float() / by_row)
    scale_columns(block, pair.readers, factors)


def tie(block: nn.Module, pair: Pair, factors: Tensor, config: Any) -> Tensor:
    """`factors` [in] with one value, the geometric mean, for columns that one source row feeds (grouped queries)."""
    rows = source_rows(block, pair, config).to(factors.device)  # [in]
    total = torch.zeros(int(rows.max()) + 1, device=factors.device)  # [out]
    logs = total.index_add(0, rows, factors.log())  # [out]
    counts = total.index_add(0, rows, torch.ones_like(factors))  # [out]
    return (logs / counts.clamp(min=1))[rows].exp()  # [in]


def scale_columns(block: nn.Module, names: Iterable[str], factors: Tensor) -> None:
    """Multiply the input columns of linears by `factors` [in]."""
    for name in names:
        module = block.get_submodule(name)
        set_weight(module, weight_of(module).float() * factors)  # [out, in]


def rotate_block(block: nn.Module, family: Family, signs: Tensor) -> None:
    """Rotate the residual stream as this block sees it, by the rotation with these `signs` [width].

    Raises `RecipeError` for norms that do not commute with a rotation (LayerNorm, or one that writes the stream).
    """
    # The norms' gains go into their readers.
    _check_norms(block, family)
    reading: list[str] = []
    for norm in norms(block, family):
        if not norm.readers:
            continue
        gain = gain_of(block, norm.name)  # [width]
        assert gain is not None
        scale_columns(block, norm.readers, gain.float() + family.gain_offset)
        with torch.no_grad():
            gain.fill_(1.0 - family.gain_offset)  # a gain of 0 is folded like any other
        reading += norm.readers
    # What reads the stream is turned, then what writes it.
    for name in reading:
        module = block.get_submodule(name)
        set_weight(module, _turned(weight_of(module), signs))  # [out, width]
    for name in linears(block, family):
        if name not in reading and shape_of(block.get_submodule(name))[0] == len(signs):
            _turn_rows(block.get_submodule(name), signs)


def rotate_rest(model: nn.Module, family: Family, signs: Tensor) -> None:
    """Turn the embeddings and the head; the final norm's gain is folded into the head.

    The two must not be one tensor: the table is turned without the gain, the head with it.
    """
    for name in family.embeddings:
        table = model.get_submodule(name)
        set_weight(table, _turned(weight_of(table), signs))  # [vocabulary, width]
    head, norm = model.get_submodule(family.head), model.get_submodule(family.final_norm)
    gain = dict(norm.named_parameters())["weight"]  # [width]
    with torch.no_grad():
        folded = weight_of(head).double() * (gain.double() + family.gain_offset)  # [vocabulary, width]
        set_weight(head, _turned(folded, signs))
        gain.fill_(1.0 - family.gain_offset)


def check_rotatable(model: nn.Module, family: Family) -> None:
    """Raise `RecipeError` unless every norm on the residual stream is an RMSNorm read by linears alone."""
    final = find(model, family.final_norm) if family.final_norm else None
    head = find(model, family.head)
    if final is None or bias_of(final) is not None or isinstance(final, nn.LayerNorm) or head is None:
        kind = "no known final norm" if final is None else f"a {type(final).__name__} before the head"
        raise RecipeError(
            f"{type(model).__name__} has {kind}: its residual stream cannot be rotated; leave rotate out"
        )
    for _, block in blocks(model, family):
        _check_norms(block, family)


def _check_norms(block: nn.Module, family: Family) -> None:
    found = norms(block, family)
    if not any(norm.readers for norm in found):
        raise RecipeError(
            f"the family of this model does not say who reads the norms of {type(block).__name__}: "
            "its residual stream cannot be rotated; leave rotate out"
        )
    for norm in found:
        module = block.get_submodule(norm.name)
        inside_head = norm.name.rpartition(".")[2] in ("q_norm", "k_norm")
        if inside_head and not norm.readers:
            continue
        if (
            bias_of(module) is not None
            or isinstance(module, nn.LayerNorm)
            or not norm.exclusive
            or not norm.readers
        ):
            raise RecipeError(
                f"{norm.name} ({type(module).__name__}) does not commute with a rotation of the residual stream; "
                "rotation needs RMSNorms that only linears read (Llama, Mistral, Qwen); leave it out for this model"
            )


def inner_readers(block: nn.Module, family: Family) -> tuple[str, ...]:
    """The linears that read an inner activation of the MLP: neither a norm's output nor values of the attention.

    Raises `RecipeError` where the family does not say who reads the norms.
    """
    outer = {name for norm in norms(block, family) for name in norm.readers}
    if not outer:
        raise RecipeError(
            f"the family of this model does not say who reads the norms of {type(block).__name__}: "
            "leave rotate-mlp out"
        )
    values = {name for pair in family.pairs if pair.layout != "rows" for name in pair.readers}
    return tuple(name for name in linears(block, family) if name not in outer | values)


def scaling_sites(
    block: nn.Module, family: Family, config: Any, turned: Iterable[str] = ()
) -> list[tuple[tuple[str, ...], Norm | Pair]]:
    """Where factors can be folded: (readers of one input, what produces it), in order of use.

    Factors cannot pass the rotation before the linears `turned`.
    """
    folding = [norm for norm in norms(block, family) if norm.exclusive and norm.readers]
    straight = [pair for pair in pairs(block, family, config) if not set(pair.readers) & set(turned)]
    producers: list[Norm | Pair] = [*folding, *straight]
    return [(producer.readers, producer) for producer in producers]


def _turned(rows: Tensor, signs: Tensor) -> Tensor:
    """`rows` [n, width] times the rotation with these signs, fp32."""
    parts = [turn_inputs(part.double() * signs).float() for part in rows.split(ROWS)]  # each [<= ROWS, width]
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # [n, width]


def _turn_rows(module: nn.Module, signs: Tensor) -> None:
    """Turn what a linear writes."""
    set_weight(module, _turned(weight_of(module).T, signs).T)  # [width, in]
    bias = bias_of(module)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(_turned(bias[None], signs)[0])  # [width]
