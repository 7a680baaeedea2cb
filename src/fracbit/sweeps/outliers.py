"""Which columns of every linear a run keeps in 16 bits: who produces whose input; by proxy, chance or activation.

arXiv:2212.09720 speaks of consecutive layers i -> i + 1. In a transformer block that is plain for value -> output and
up -> down (the family's pairs). What queries, keys and the MLP's first layer read is a sum on the residual stream: there the
producer is the layer that wrote to the stream last, and the embedding table before the first block. The paper does not spell
this case out; it is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import RecipeError
from fracbit.importance.proxy_columns import largest_columns, random_columns, unit_spread
from fracbit.models.blocks import blocks, groups, norms, pairs, shape_of, source_rows, weight_of
from fracbit.models.family import Family
from fracbit.numerics.stats import Stats
from fracbit.records.row import Outliers


def producer_scores(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """Score [in] of every input column of every linear of the blocks, by full name, from the float weights.

    Raises `RecipeError` for a linear whose input no known layer produces.
    """
    scores: dict[str, Tensor] = {}
    stream = unit_spread(weight_of(model.get_submodule(family.embeddings[0])).T)  # [width]
    for prefix, block in blocks(model, family):
        readers = {name for norm in norms(block, family) for name in norm.readers}
        paired = _paired(model, family, block)
        before: dict[str, Tensor] = {}
        for group in groups(block, family):
            for name in group:
                spread = unit_spread(weight_of(block.get_submodule(name)))
                score = paired.get(name)
                if score is None:
                    score = (
                        stream
                        if name in readers
                        else _last_fitting(before, shape_of(block.get_submodule(name))[1])
                    )
                if score is None or len(score) != shape_of(block.get_submodule(name))[1]:
                    raise RecipeError(
                        f"no layer before {prefix}.{name} produces its input: leave outliers out for this model"
                    )
                scores[f"{prefix}.{name}"] = score
                before[name] = spread
            writers = [name for name in group if name not in readers and len(before[name]) == len(stream)]
            stream = before[writers[-1]] if writers else stream
    return scores


def choose_columns(
    outliers: Outliers,
    widths: Mapping[str, int],
    scores: Mapping[str, Tensor],
    stats: Mapping[str, Stats],
    seed: int,
) -> dict[str, Tensor]:
    """Columns int32 [p] to keep, by layer. `widths`: inputs of each layer; `scores` of the proxy, `stats` for activation."""
    generator = torch.Generator().manual_seed(seed)
    if outliers.chosen == "random":
        return {name: random_columns(width, outliers.share, generator) for name, width in widths.items()}
    source = scores if outliers.chosen == "proxy" else {name: stats[name].energy for name in widths}
    return {name: largest_columns(source[name], outliers.share) for name in widths}


def _paired(model: PreTrainedModel, family: Family, block: torch.nn.Module) -> dict[str, Tensor]:
    """Scores of the readers of the family's pairs: the source's spread, row by row as it reaches their columns."""
    found: dict[str, Tensor] = {}
    for pair in pairs(block, family, model.config):
        spread = unit_spread(weight_of(block.get_submodule(pair.source)))
        rows = source_rows(block, pair, model.config)
        found |= dict.fromkeys(pair.readers, spread[rows])
    return found


def _last_fitting(before: Mapping[str, Tensor], width: int) -> Tensor | None:
    fitting = [spread for spread in before.values() if len(spread) == width]
    return fitting[-1] if fitting else None
