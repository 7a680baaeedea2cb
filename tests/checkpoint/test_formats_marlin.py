"""Marlin's layout of GPTQ and AWQ, decoded while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import (
    SIZES,
    Packed,
    change_config,
    change_tensors,
    check_quantized,
    check_read,
    rounded_groups,
    two_folders,
)

WIDE = SIZES | {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
UP = "model.layers.0.mlp.up_proj"
GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"}
AWQ: Mapping[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "marlin"}


def words(codes: Tensor) -> Tensor:
    """int32 [in / 16, 2 out] of codes [in, out], thread by thread of a tensor core, as the kernel's authors draw it."""
    width, out = codes.shape
    numbers = codes.tolist()
    found = torch.zeros(width // 16, 2 * out, dtype=torch.int64)
    for k in range(width // 16):
        for n in range(out // 64):
            for thread in range(32):
                column, row = thread // 4, 2 * (thread % 4)
                for tile in range(4):
                    left, right = (64 * n + 16 * tile + column + half for half in (0, 8))
                    rows = [16 * k + row + step for step in (0, 1, 8, 9)]
                    eight = [numbers[each][place] for place in (left, right) for each in rows]
                    order = [eight[place] for place in (0, 2, 4, 6, 1, 3, 5, 7)]
                    word = sum(code << 4 * place for place, code in enumerate(order))
                    found[k, 128 * n + 4 * thread + tile] = word
    return torch.where(found >= 2**31, found - 2**32, found).int()


def scales(grid: Tensor) -> Tensor:
    """Scales [groups, out] as the threads load them: every eighth output of 64, or pairs of 32 for one scale a row."""
    found = torch.empty_like(grid)
    size = 64 if len(grid) > 1 else 32
    for start in range(0, grid.shape[1], size):
        if size == 64:
            order = [i + 8 * j for i in range(8) for j in range(8)]
        else:
            order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        found[:, start : start + size] = grid[:, start + torch.tensor(order)]
    return found


def packer(names: tuple[str, str], group: int) -> Any:
    def pack(name: str, weight: Tensor) -> Packed:
        layer = name.removesuffix(".weight")
        size = group if group > 0 else weight.shape[1]
        codes, scale, _ = rounded_groups(weight, 4, size, asymmetric=False)
        value = (codes - 8) * scale.float().repeat_interleave(size, 1)
        stored = {f"{layer}.{names[0]}": words(codes.T.int()), f"{layer}.{names[1]}": scales(scale.T)}
        return stored, value.to(weight.dtype)

    return pack


def made(tmp_path: Path, settings: Any, names: tuple[str, str], group: int = 64) -> tuple[Path, Path]:
    model = tiny_llama(**WIDE | {"num_hidden_layers": 1})
    return two_folders(model, tmp_path, packer(names, group), settings, dtype=torch.float16)


@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("settings", [GPTQ, AWQ, {"quant_method": "marlin"}, None])
def test_codes_and_scales_come_back_in_order(tmp_path: Path, settings: Any, group: int) -> None:
    names = ("qweight", "scales") if settings is AWQ else ("B", "s")
    settings = settings and {**settings, "group_size": group}
    coded, plain = made(tmp_path, settings, names, group)
    change_tensors(
        coded, lambda tensors: tensors.update({f"{UP}.workspace": torch.zeros(4, dtype=torch.int32)})
    )
    assert check_read(coded, plain).decoded == "Marlin, 4 bits"


def test_it_is_quantized_as_the_floats_are(tmp_path: Path) -> None:
    check_quantized(*made(tmp_path, GPTQ, ("B", "s")), tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path, GPTQ, ("B", "s"))

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    change_config(coded, bits=8)
    refuses("Marlin's layout with 8 bits; fracbit decodes its 4 bits")
    change_config(coded, bits=4, desc_act=True)
    refuses("4 bits and sorted inputs")
    change_config(coded, desc_act=None)
    change_tensors(coded, lambda tensors: tensors.update({f"{UP}.s": tensors[f"{UP}.s"][:, :-64].clone()}))
    refuses(rf"{UP}\.B is I32 \[8, 384\] and {UP}\.s \[2, 128\]")
    change_tensors(coded, lambda tensors: tensors.pop(f"{UP}.s"))
    refuses(rf"lacks {UP}\.s, without which")
