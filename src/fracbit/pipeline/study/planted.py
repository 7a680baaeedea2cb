"""Planted activation outliers: a small trained model has few, so this adds outliers like those of a large model."""

from __future__ import annotations

import torch

from fracbit.models.blocks import blocks, gain_of, norms
from fracbit.models.fold import fold_norm
from fracbit.perturbation import check_intensity
from fracbit.pipeline.study.float_model import FloatModel


def plant_outliers(float_model: FloatModel, factor: float = 50.0, channels: int = 2, seed: int = 0) -> int:
    """Plant activation outliers without changing the model: scale some norm gains up and the columns that read them down.

    `channels` of every norm that only linears read are scaled by `factor`, in place. Returns how many norms were changed.
    """
    check_intensity(factor)
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for _, block in blocks(float_model.model, float_model.family):
        for norm in norms(block, float_model.family):
            gain = gain_of(block, norm.name)  # [width]
            if not norm.exclusive or not norm.readers or gain is None:
                continue
            factors = torch.ones(len(gain))  # [width]
            factors[torch.randperm(len(gain), generator=generator)[:channels]] = 1 / factor
            fold_norm(block, float_model.family, norm, factors.to(gain.device))
            changed += 1
    return changed
