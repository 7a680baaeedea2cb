"""AQLM, decoded while it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_tensors, check_quantized, check_read, two_folders

UP = "model.layers.0.mlp.up_proj"


def pack(name: str, weight: Tensor, books: int, bits: int, rows: int) -> Packed:
    """Random codes for vectors of [rows, 8] weights; the weight is put together number by number."""
    generator = torch.Generator().manual_seed(len(name))
    layer, groups = name.removesuffix(".weight"), (weight.shape[0] // rows, weight.shape[1] // 8)
    codes = torch.randint(0, 1 << bits, (*groups, books), generator=generator)
    vectors = torch.randn(books, 1 << bits, rows, 8, generator=generator).half()
    scales = (0.02 * torch.rand(groups[0], 1, 1, 1, generator=generator) + 0.01).half()
    value = torch.zeros(weight.shape)
    for i in range(groups[0]):
        for j in range(groups[1]):
            part = sum(vectors[k, codes[i, j, k]].float() for k in range(books)) * scales[i].float()
            value[i * rows : (i + 1) * rows, j * 8 : (j + 1) * 8] = part
    half = 1 << (bits - 1)
    kind = torch.int8 if bits <= 8 else torch.int16
    signed = torch.where(codes >= half, codes - 2 * half, codes).to(kind)
    return {f"{layer}.codes": signed, f"{layer}.codebooks": vectors, f"{layer}.scales": scales}, value.half()


def made(tmp_path: Path, books: int, bits: int, rows: int = 1) -> tuple[Path, Path]:
    settings = {
        "quant_method": "aqlm", "in_group_size": 8, "out_group_size": rows, "num_codebooks": books,
        "nbits_per_codebook": bits, "linear_weights_not_to_quantize": ["lm_head.weight"],
    }  # fmt: skip
    model = tiny_llama(**SIZES | {"num_hidden_layers": 1})
    return two_folders(
        model,
        tmp_path,
        lambda name, weight: pack(name, weight, books, bits, rows),
        settings,
        dtype=torch.float16,
    )


@pytest.mark.parametrize(("books", "bits", "rows"), [(2, 8, 1), (1, 12, 1), (1, 8, 4)])
def test_codebooks_of_every_kind_are_read(tmp_path: Path, books: int, bits: int, rows: int) -> None:
    coded, plain = made(tmp_path, books, bits, rows)
    source = check_read(coded, plain)
    assert source.decoded == f"AQLM, {books}x{bits}"
    if books == 2:
        check_quantized(coded, plain, tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path, 2, 8)
    change_tensors(coded, lambda tensors: tensors.update({f"{UP}.scales": torch.ones(3, 1, 1, 1).half()}))
    with pytest.raises(
        SourceError, match=rf"{UP} has codes I8 .*scales F16 \[3, 1, 1, 1\]; AQLM has integer codes"
    ):
        open_float(coded)
