"""The one place where layers are quantized: from the weights, schemes and statistics of one input to packed weights.

Both loops, the matrices outside the blocks and every run of a sweep use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.packed import outlier_count
from fracbit.numerics.stats import Stats
from fracbit.quantizers import Quantized, Quantizer, Rule, nearest, quantize_group
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Method:
    """How the layers of a run are quantized.

    - `fill`: the quantizer. `unseen`: the quantizer of layers without statistics: all layers of a data-free run, and
      experts that saw no token.
    - `rule` chooses the `share` of input columns that stay in 16 bits; None: no columns. `columns`: columns by layer
      that were chosen before the run, by a rule that reads no statistics.
    """

    fill: Quantizer
    unseen: Quantizer
    rule: Rule | None = None
    share: float = 0.0
    columns: Mapping[str, Tensor] | None = None

    def columns_of(self, layer: str, weight: Tensor, scheme: Scheme, stats: Stats | None) -> Tensor | None:
        """The input columns int32 [p] of a layer's `weight` [out, in] that stay in 16 bits; None where none do."""
        if self.rule is None:
            return None
        if self.columns is not None:
            chosen = self.columns.get(layer)
        else:
            count = outlier_count(weight.shape[1], self.share)
            chosen = self.rule(weight, scheme, stats, count=count, generator=torch.Generator())
        return None if chosen is None or not len(chosen) else chosen.to(weight.device)


def nearest_like(method: Method, search: bool) -> Method:
    """Round-to-nearest with the same columns in 16 bits."""
    return replace(method, fill=nearest(search), unseen=nearest(search))


def plain_nearest(search: bool) -> Method:
    """Round-to-nearest with no columns in 16 bits, for embeddings and head."""
    return Method(nearest(search), nearest(search))


def quantize_layers(
    method: Method, weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], stats: Stats | None = None
) -> dict[str, Quantized]:
    """Quantize layers that read the same input: `weights` [out, in] and `schemes` by full name, `stats` of that input.

    Raises `WeightError` naming the layers.
    """
    names = list(weights)
    columns = [method.columns_of(name, weights[name], schemes[name], stats) for name in names]
    try:
        found = quantize_group(
            method.unseen if stats is None else method.fill,
            list(weights.values()),
            schemes=[schemes[name] for name in names],
            stats=stats,
            columns=columns,
        )
    except WeightError as error:
        what = "layer" if len(names) == 1 else "layers"
        raise WeightError(f"{what} {', '.join(names)}: {error}") from error
    return dict(zip(names, found, strict=True))
