"""Smoothing and scaling in the loop: factors from the statistics of a block, folded into it before it is quantized.

The block still computes the same function. When the inputs of a linear are divided, its statistics are divided too.
Sites are taken in order of use. The inputs of a mixture of experts are scaled by the summed statistics of its experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from torch import Tensor

from fracbit.models.blocks import weight_of
from fracbit.models.family import Norm
from fracbit.models.fold import fold_norm, fold_pair, scaling_sites, storable, tie
from fracbit.numerics.stats import Stats, merge
from fracbit.pipeline.quantize.work import Block, Work
from fracbit.transforms import transforms_of


def rewrite_block(work: Work, block: Block, stats: dict[str, Stats]) -> None:
    """Fold the factors of the recipe's transforms into a block and update `stats` (by the first linear of each group).

    Factors are chosen so that the new gains fit the type in which norms are saved. No factor can be folded through a
    rotation: linears with inputs that are rotated at run time are left out.
    """
    module, family, config = block.module, work.opened.family, work.opened.model.config
    for factors_for in (
        t.factors for t in transforms_of(work.calibration.transforms) if t.factors is not None
    ):
        for readers, producer in scaling_sites(module, family, config, block.turned):
            known = [reader for reader in readers if reader in stats]
            quantized = [reader for reader in readers if reader in block.schemes]
            if not known or not quantized:
                continue
            # The factors that the transform finds for all linears that read here together.
            together = reduce(merge, (stats[reader] for reader in known))
            weights = [weight_of(module.get_submodule(reader)) for reader in quantized]  # [out, in] each
            factors = factors_for(weights, [block.schemes[reader] for reader in quantized], together)  # [in]
            # Folded into the norm or linear before them, as far as it can hold them.
            if isinstance(producer, Norm):
                factors = storable(module, family, norm=producer, factors=factors, dtype=work.source_dtype)
                fold_norm(module, family, producer, factors)
            else:
                factors = tie(module, producer, factors, config)
                fold_pair(module, producer, factors, config)
            for reader in known:
                stats[reader] = divided(stats[reader], factors)


def divided(stats: Stats, factors: Tensor) -> Stats:
    """The statistics of inputs that were divided by `factors` [in]."""
    gram = None if stats.gram is None else stats.gram / (factors[:, None] * factors)  # [in, in]
    return replace(stats, gram=gram, absmax=stats.absmax / factors, energy=stats.energy / factors.square())
