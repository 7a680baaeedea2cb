"""HQQ, decoded while it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.summary import summarize
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_tensors, check_quantized, check_read, two_folders

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
PACKINGS = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


def text(of: str) -> Tensor:
    return torch.tensor([ord(letter) for letter in of], dtype=torch.uint8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes in words, the first part of them in the highest field."""
    fields, shift = (10, 3) if bits == 3 else (8 // {6: 8}.get(bits, bits), {6: 8}.get(bits, bits))
    step = -(-len(codes) // fields)
    found = torch.zeros(step, codes.shape[1], dtype=torch.int64)
    for row, line in enumerate(codes):
        part, place = divmod(row, step)
        found[place] |= line.long() << shift * (fields - 1 - part)
    return found.to(torch.int32 if bits == 3 else torch.uint8)


def packer(bits: int, axis: int, *, group: int = 64, viewed: bool = False) -> Callable[[str, Tensor], Packed]:
    def pack(name: str, weight: Tensor) -> Packed:
        grid = (
            weight.float().reshape(-1, group) if axis == 1 else weight.float().reshape(group, -1)
        )  # [n, 64] or [64, n]
        low, high = grid.amin(axis, keepdim=True), grid.amax(axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).to(weight.dtype)
        zero = (-low / scale.float()).to(weight.dtype)  # a float
        codes = (grid / scale.float() + zero.float()).round().clamp(0, 2**bits - 1)
        value = ((codes.to(weight.dtype) - zero) * scale).reshape(weight.shape)
        layer, words = name.removesuffix(".weight"), packed(codes, bits)
        numbers = {
            "shape": torch.tensor(weight.shape), "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32), "axis": torch.tensor(axis, dtype=torch.int32),
            "packing": text(PACKINGS[bits]), "unpack_view_dtype": text(f"torch.{words.dtype}".replace("torch.torch", "torch")),
            "view_as_float": torch.tensor(int(viewed), dtype=torch.uint8), "compute_dtype": text(str(weight.dtype)),
            "quant_scale": torch.tensor(0, dtype=torch.uint8), "quant_zero": torch.tensor(0, dtype=torch.uint8),
            "stores_quant_config": torch.tensor(1, dtype=torch.uint8), "optimize": torch.tensor(1, dtype=torch.uint8),
        }  # fmt: skip
        parts = {"W_q": words.view(weight.dtype) if viewed else words, "scale": scale, "zero": zero} | numbers
        return {f"{layer}.{part}": tensor for part, tensor in parts.items()}, value

    return pack


def made(tmp_path: Path, pack: Any, settings: Any = SETTINGS) -> tuple[Path, Path]:
    model = tiny_llama(**SIZES | {"num_hidden_layers": 1})
    return two_folders(model, tmp_path, pack, settings, dtype=torch.bfloat16)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", PACKINGS)
def test_every_width_along_both_axes(tmp_path: Path, bits: int, axis: int) -> None:
    assert check_read(*made(tmp_path, packer(bits, axis))).decoded == f"HQQ, {bits} bits"


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_that_are_stored_as_floats(tmp_path: Path, bits: int) -> None:
    check_read(*made(tmp_path, packer(bits, 1, viewed=True)))


def test_it_is_seen_without_a_config_and_quantized_as_the_floats_are(tmp_path: Path) -> None:
    coded, plain = made(tmp_path, packer(4, 1), None)
    check_quantized(coded, plain, tmp_path)
    assert summarize(str(coded))["layers"][UP]["scheme"] == "int:step4f/64 s=bf16"


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path, packer(4, 1))

    def changed(says: str, **tensors: Tensor | None) -> None:
        kept: dict[str, Tensor] = {}

        def change(stored: dict[str, Tensor]) -> None:
            kept.update({name: stored.pop(f"{UP}.{name}") for name in tensors})
            stored.update({f"{UP}.{name}": tensor for name, tensor in tensors.items() if tensor is not None})

        change_tensors(coded, change)
        with pytest.raises(SourceError, match=says):
            open_float(coded)
        change_tensors(
            coded, lambda stored: stored.update({f"{UP}.{name}": each for name, each in kept.items()})
        )

    changed(rf"lacks {UP}\.scale, without which", scale=None)
    changed(rf"lacks {UP}\.nbits, which says how", nbits=None)
    changed(r"has shape \[\] and packing '4bit_u8'", shape=None)
    changed(r"packing '5bit_u8'; fracbit decodes matrices in 8bit_u8", packing=text("5bit_u8"))
    changed(r"do not fit a weight \[192, 64\] in 4bit_u8", shape=torch.tensor([192, 64]))
    changed(r"do not fit a weight \[192, 128\] in 2bit_u8", packing=text("2bit_u8"))
    changed("scales or zero points that are quantized themselves", quant_zero=torch.tensor(1))
