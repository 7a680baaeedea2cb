"""Linears that read the same inputs, quantized as one: their statistics, the factorization and the column loop are shared.

Where every row of a scheme stands for itself (blocks along the input, scales stored as floats, no table for the whole
tensor), the weights are stacked, quantized in one sweep and cut apart again; the result is the same, bit for bit, and the
column loop runs once for q, k and v. Elsewhere only the factorization is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fracbit.numerics.datatypes import is_fitted
from fracbit.numerics.packed import PackedTensor
from fracbit.numerics.stats import Stats
from fracbit.quantizers.gptq import Gptq, relative
from fracbit.quantizers.quantizer import Quantized, Quantizer
from fracbit.records.scheme import Scheme

_BY_ROW = ("codes", "scales", "offsets", "outliers")


def quantize_group(
    quantizer: Quantizer, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats | None
) -> list[Quantized]:
    """Quantize the `weights` [out, in] of linears with one input, each by its scheme; in the order given."""
    if not isinstance(quantizer, Gptq) or stats is None or stats.gram is None or len(weights) == 1:
        return [quantizer(weight, scheme, stats) for weight, scheme in zip(weights, schemes, strict=True)]
    coupling = quantizer.couple(stats.gram)
    if len(set(schemes)) > 1 or not rows_stand_alone(schemes[0]):
        pairs = zip(weights, schemes, strict=True)
        return [quantizer(weight, scheme, stats, coupling=coupling) for weight, scheme in pairs]
    whole = quantizer.rows(
        torch.cat([weight.float() for weight in weights]), schemes[0], stats.gram, coupling
    )
    sizes = [len(weight) for weight in weights]
    parts = zip(
        split_rows(whole.packed, sizes), whole.costs.split(sizes), whole.powers.split(sizes), strict=True
    )
    return [Quantized(packed, relative(costs, powers), whole.notes) for packed, costs, powers in parts]


def rows_stand_alone(scheme: Scheme) -> bool:
    """Whether an output row is stored without anything that other rows share."""
    inside = isinstance(scheme.block, int) or scheme.block == "row"
    own_table = scheme.dtype.endswith(":row") or not is_fitted(scheme)
    return scheme.axis == "in" and inside and own_table and isinstance(scheme.scale, str)


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


def _rows(part: Tensor | None, rows: slice) -> Tensor | None:
    return None if part is None else part[rows].clone()
