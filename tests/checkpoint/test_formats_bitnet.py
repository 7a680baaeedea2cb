"""Packed BitNet, decoded while it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_config, change_tensors, check_quantized, check_read, two_folders

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}


def pack(name: str, weight: Tensor, divides: bool = False) -> Packed:
    """Four outputs in a byte, a quarter of all outputs apart."""
    mean = weight.float().abs().mean().to(weight.dtype)
    ternary = (weight.float() / mean.float()).round().clamp(-1, 1) + 0.0  # no -0
    codes = (ternary + 1).byte().chunk(4)
    packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    scale = (1 / mean.float()).to(weight.dtype) if divides else mean
    value = ternary / scale.float() if divides else ternary * scale.float()
    return {name: packed, f"{name}_scale": scale.view(1)}, value.to(weight.dtype)


def made(tmp_path: Path, **settings: str) -> tuple[Path, Path]:
    model = tiny_llama(**SIZES | {"num_hidden_layers": 1})
    divides = settings.get("linear_class") == "bitlinear"
    return two_folders(
        model,
        tmp_path,
        lambda name, weight: pack(name, weight, divides),
        SETTINGS | settings,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_both_classes_are_read_and_quantized_as_the_floats_are(tmp_path: Path, kind: str) -> None:
    coded, plain = made(tmp_path, linear_class=kind)
    source = check_read(coded, plain)
    assert source.decoded == "BitNet, ternary in 2 bits"
    assert any("rounds the activations" in note for note in source.notes)
    if kind == "autobitlinear":
        check_quantized(coded, plain, tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path)

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    change_config(coded, use_rms_norm=True)
    refuses("normalizes the inputs of every layer within it")
    change_config(coded, use_rms_norm=None)
    change_tensors(coded, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    refuses(rf"{UP}\.weight is U8 \[48, 128\] and its weight_scale none")
