"""Linears that read the same inputs, quantized as one: their statistics, the factorization and the column loop are shared.

Where every row of a scheme stands for itself (blocks along the input, scales stored as floats, no table for the whole
tensor), the weights are stacked, quantized in one sweep and cut apart again: the column loop runs once for q, k and v.
Elsewhere, and where columns stay in 16 bits, only the factorization is shared. A quantizer that shares nothing between linears
(`couple` gives None) takes them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fracbit.numerics.packed import PackedTensor, rows_apart
from fracbit.numerics.stats import Stats
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.records.scheme import Scheme

_BY_ROW = ("codes", "scales", "offsets", "outliers")


def quantize_group(
    fill: Quantizer,
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    stats: Stats | None,
    columns: Sequence[Tensor | None] | None = None,
) -> list[Quantized]:
    """Quantize the `weights` [out, in] of linears with one input, each by its scheme; in the order given.

    `columns`: for every weight the numbers int [p] of its input columns that stay in 16 bits, or None.
    """
    sixteen = [None] * len(weights) if columns is None else [_some(numbers) for numbers in columns]
    shares = len(weights) > 1 and any(numbers is None for numbers in sixteen)
    coupling = fill.couple(stats) if shares else None
    stacks = coupling is not None and not any(numbers is not None for numbers in sixteen)
    if stacks and len(set(schemes)) == 1 and rows_stand_alone(schemes[0]):
        whole = fill(torch.cat([w.float() for w in weights]), schemes[0], stats, coupling=coupling)
        return split_quantized(whole, [len(weight) for weight in weights])
    return [
        fill(weight, scheme, stats, columns=numbers, coupling=coupling if numbers is None else None)
        for weight, scheme, numbers in zip(weights, schemes, sixteen, strict=True)
    ]


def rows_stand_alone(scheme: Scheme) -> bool:
    """Whether an output row is stored without anything that other rows share."""
    return rows_apart((2, 1), scheme) == 1


def split_quantized(whole: Quantized, sizes: Sequence[int]) -> list[Quantized]:
    """Cut a quantized stack whose rows stand alone into runs of `sizes` rows; notes go to every part."""
    parts = zip(
        split_rows(whole.packed, sizes), whole.costs.split(list(sizes)), whole.powers.split(list(sizes)),
        strict=True,
    )  # fmt: skip
    return [Quantized(packed, costs, powers, whole.notes) for packed, costs, powers in parts]


def split_rows(packed: PackedTensor, sizes: Sequence[int]) -> list[PackedTensor]:
    """Cut a packed tensor whose rows stand alone into runs of `sizes` rows."""
    result, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        first += size
        cut: dict[str, Any] = {name: _rows(getattr(packed, name), rows) for name in _BY_ROW}
        table = packed.table if packed.table is None or len(packed.table) == 1 else packed.table[rows].clone()
        result.append(replace(packed, shape=(size, packed.shape[1]), table=table, **cut))
    return result


def _some(columns: Tensor | None) -> Tensor | None:
    return columns if columns is not None and len(columns) else None


def _rows(part: Tensor | None, rows: slice) -> Tensor | None:
    return None if part is None else part[rows].clone()  # [rows, ...]
