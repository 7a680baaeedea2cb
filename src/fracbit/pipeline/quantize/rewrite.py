"""Smoothing and scaling in the loop: factors from the statistics of a block, folded into it before it is quantized.

The block's function stays the same; the statistics of every linear whose inputs were divided are divided along. Sites are taken
in order of use, and what feeds a mixture of experts is judged by the sum over its experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fracbit.models.blocks import weight_of
from fracbit.models.family import Family, Norm
from fracbit.models.fold import fold_norm, fold_pair, scaling_sites, storable, tie
from fracbit.numerics.stats import Stats, merge
from fracbit.records.scheme import Scheme
from fracbit.transforms import transforms_of


def rewrite_block(
    names: Sequence[str],
    block: nn.Module,
    family: Family,
    config: Any,
    schemes: Mapping[str, Scheme],
    stats: dict[str, Stats],
    stored: torch.dtype,
    turned: Sequence[str] = (),
) -> None:
    """Fold the factors of the transforms `names` into `block`, in place; `stats`, by the first linear of each group, follows.

    `stored` is the type in which norms are saved: factors are chosen so that it holds the gains that are left. The inputs of
    the linears `turned` are rotated at run time: nothing can be folded through that.
    """
    for factors_for in (each.factors for each in transforms_of(names) if each.factors is not None):
        for readers, producer in scaling_sites(block, family, config, turned):
            known = [reader for reader in readers if reader in stats]
            quantized = [reader for reader in readers if reader in schemes]
            if not known or not quantized:
                continue
            together = reduce(merge, (stats[reader] for reader in known))
            weights = [weight_of(block.get_submodule(reader)) for reader in quantized]
            factors = factors_for(weights, [schemes[reader] for reader in quantized], together)
            if isinstance(producer, Norm):
                factors = storable(block, family, producer, factors, stored)
                fold_norm(block, family, producer, factors)
            else:
                factors = tie(block, producer, factors, config)
                fold_pair(block, producer, factors, config)
            for reader in known:
                stats[reader] = divided(stats[reader], factors)


def divided(stats: Stats, factors: Tensor) -> Stats:
    """The statistics of inputs that were divided by `factors` [in]."""
    gram = None if stats.gram is None else stats.gram / (factors[:, None] * factors)
    return replace(stats, gram=gram, absmax=stats.absmax / factors, energy=stats.energy / factors.square())
