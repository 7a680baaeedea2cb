"""Input columns that are chosen before a run, by rules without calibration data: by their producers, or at random.

arXiv:2212.09720 describes consecutive layers i -> i + 1. In a transformer block these are value -> output and up ->
down (the family's pairs). Queries, keys and the MLP's first layer read a sum, the residual stream. Their producer is
the last layer that wrote to the stream, or the embedding table before the first block. The paper does not describe this
case; it is our reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fracbit.checkpoint.opened import Opened
from fracbit.errors import RecipeError
from fracbit.importance.proxy_columns import unit_spread
from fracbit.models.blocks import blocks, groups, norms, pairs, shape_of, source_rows
from fracbit.numerics.packed import outlier_count
from fracbit.quantizers import Rule
from fracbit.records.scheme import Scheme


def choose_columns(
    rule: Rule,
    share: float,
    schemes: Mapping[str, Scheme],
    opened: Opened,
    read: Callable[[str], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Columns int32 [p] of every linear of the blocks among `schemes`, by name, in the order of the model.

    `read` gives the float weight [out, in] of a layer. Raises `RecipeError` where a rule needs producers that are not known.
    """
    spreads = producer_spreads(opened, read) if "producers" in rule.needs else {}
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Tensor] = {}
    for name, layer in opened.linears.items():
        if name in schemes:
            shape = torch.empty(layer.out, layer.width)  # never read, so never in memory
            count = outlier_count(layer.width, share)
            spread = spreads.get(name)
            chosen[name] = rule(
                shape, schemes[name], None, count=count, generator=generator, producer_spread=spread
            )
    return chosen


def producer_spreads(opened: Opened, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Weight std [in] of the producer of every input column of every linear of the blocks, by full name.

    Raises `RecipeError` for a linear whose input no known layer produces.
    """
    model, family = opened.model, opened.family
    found: dict[str, Tensor] = {}
    stream = unit_spread(read(family.embeddings[0]).T)  # [width]
    for path, block in blocks(model, family):
        readers = {name for norm in norms(block, family) for name in norm.readers}
        spreads = {
            name: unit_spread(read(f"{path}.{name}")) for name in _names(groups(block, family))
        }  # [out] each
        paired = _paired(block, opened, spreads)
        before: dict[str, Tensor] = {}
        for group in groups(block, family):
            for name in group:
                width = shape_of(block.get_submodule(name))[1]
                known = stream if name in readers else _last_fitting(before, width)
                spread = paired.get(name, known)  # [in]
                if spread is None or len(spread) != width:
                    raise RecipeError(
                        f"no layer before {path}.{name} produces its input: choose outliers by cost or activation"
                    )
                found[f"{path}.{name}"] = spread
                before[name] = spreads[name]
            writers = [name for name in group if name not in readers and len(before[name]) == len(stream)]
            stream = before[writers[-1]] if writers else stream  # [width]
    return found


def _names(groups: Iterable[tuple[str, ...]]) -> list[str]:
    return [name for group in groups for name in group]


def _paired(block: nn.Module, opened: Opened, spreads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the readers of the family's pairs: the spread of the source's rows, in the order of the readers' columns."""
    found: dict[str, Tensor] = {}
    for pair in pairs(block, opened.family, opened.model.config):
        rows = source_rows(block, pair, opened.model.config)  # [in]
        found |= dict.fromkeys(pair.readers, spreads[pair.source][rows])  # [in] each
    return found


def _last_fitting(before: Mapping[str, Tensor], width: int) -> Tensor | None:
    fitting = [spread for spread in before.values() if len(spread) == width]
    return fitting[-1] if fitting else None
