"""Packed weights and activations for products, the same whenever they are asked for."""

from __future__ import annotations

import torch

from fracbit.numerics import PackedTensor, quantize_tensor
from fracbit.records.scheme import Scheme
from tensors import normal, seeded


def packed(scheme: Scheme, shape: tuple[int, int], outliers: int = 0) -> PackedTensor:
    """A weight of small numbers about 0.003, `outliers` of its columns in 16 bits."""
    generator = seeded(7)
    weight = torch.randn(shape, generator=generator) * 0.02 + 0.003
    if not outliers:
        return quantize_tensor(weight, scheme)
    columns = torch.randperm(shape[1], generator=generator)[:outliers].sort().values
    mask = torch.ones(shape[1], dtype=torch.bool)
    mask[columns] = False
    kept = quantize_tensor(weight[:, mask].contiguous(), scheme)
    fields = {name: getattr(kept, name) for name in ("codes", "scales", "offsets", "table")}
    return PackedTensor(
        scheme, shape, **fields, columns=columns.int(), outliers=weight[:, columns].bfloat16()
    )


def batch_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Activations [rows, columns]; another number of rows is another batch."""
    return normal(rows, columns, seed=rows).to(dtype)
