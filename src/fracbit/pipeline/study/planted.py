"""Planted activation outliers: a trained small model has few; this gives it those of a large one."""

from __future__ import annotations

import torch

from fracbit.models.blocks import blocks, gain_of, norms, weight_of
from fracbit.models.install import set_weight
from fracbit.perturbation import check_intensity
from fracbit.pipeline.study.float_model import FloatModel


def plant_outliers(subject: FloatModel, factor: float = 50.0, channels: int = 2, seed: int = 0) -> int:
    """Plant activation outliers without changing the model: scale some norm gains up and the columns that read them down.

    `channels` of every norm that only linears read are scaled by `factor`, in place. Returns how many norms were changed.
    """
    check_intensity(factor)
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for _, block in blocks(subject.model, subject.family):
        for norm in norms(block, subject.family):
            gain = gain_of(block, norm.name)  # [width]
            if not norm.exclusive or not norm.readers or gain is None:
                continue
            chosen = torch.randperm(len(gain), generator=generator)[:channels]
            module = block.get_submodule(norm.name)
            with torch.no_grad():
                offset = subject.family.gain_offset
                gain[chosen] = (gain[chosen] + offset) * factor - offset
                bias = dict(module.named_parameters(recurse=False)).get("bias")
                if bias is not None:
                    bias[chosen] *= factor
            for reader in norm.readers:
                weight = weight_of(block.get_submodule(reader)).clone()  # [out, width]
                weight[:, chosen] /= factor
                set_weight(block.get_submodule(reader), weight)
            changed += 1
    return changed
