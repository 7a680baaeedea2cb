"""AWQ in its layouts GEMM, GEMV and GEMV fast, decoded while it is read."""

from __future__ import annotations

import json
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
    stream_of,
    two_folders,
)

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words(codes: Tensor) -> Tensor:
    """Eight columns in a word, in the order in which AutoAWQ interleaves them."""
    return stream_of(codes.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)


def pack(name: str, weight: Tensor) -> Packed:
    layer = name.removesuffix(".weight")
    codes, scale, zero = rounded_groups(weight, 4, 32, asymmetric=True)
    index = torch.arange(weight.shape[1]) // 32
    stored = {
        f"{layer}.qweight": words(codes.T),
        f"{layer}.qzeros": words(zero.T),
        f"{layer}.scales": scale.T,
    }
    return stored, ((codes - zero[:, index]) * scale.float()[:, index]).to(weight.dtype)


def pack_gemv(name: str, weight: Tensor) -> Packed:
    """Words along the inputs; zero points and scales up to a multiple of 32 groups."""
    layer = name.removesuffix(".weight")
    codes, scale, zero = rounded_groups(weight, 4, 32, asymmetric=True)
    index = torch.arange(weight.shape[1]) // 32
    padding = (0, 32 - scale.shape[1])
    stored = {
        f"{layer}.qweight": stream_of(codes, 4),
        f"{layer}.qzeros": stream_of(torch.nn.functional.pad(zero, padding), 4),
        f"{layer}.scales": torch.nn.functional.pad(scale, padding),
    }
    return stored, ((codes - zero[:, index]) * scale.float()[:, index]).to(weight.dtype)


def pack_fast(name: str, weight: Tensor, zeros: str = "qzeros") -> Packed:
    """Four outputs by 64 inputs at a time, four codes in 16 bits; a zero point is an offset."""
    layer, (out, width) = name.removesuffix(".weight"), weight.shape
    codes, scale, zero = rounded_groups(weight, 4, 32, asymmetric=True)
    index = torch.arange(width) // 32
    order = [8 * a + 2 * b + c for b in range(4) for c in range(2) for a in range(4)]  # of 32 inputs
    numbers, rows = codes.int().tolist(), []
    for first in range(0, out, 4):
        line: list[int] = []
        for start in range(0, width, 64):
            places = [start + half + each for half in (0, 32) for each in order]
            tile = [numbers[first + row][place] for row in range(4) for place in places]
            line += [sum(tile[4 * at + k] << 4 * k for k in range(4)) for at in range(64)]
        rows.append(line)
    words = torch.tensor(rows)
    offset = -(scale.float() * zero).to(weight.dtype)
    padding = (0, 32 - scale.shape[1])
    stored = {
        f"{layer}.qweight": torch.where(words >= 2**15, words - 2**16, words).to(torch.int16),
        f"{layer}.{zeros}": torch.nn.functional.pad(offset, padding).T,
        f"{layer}.scales": torch.nn.functional.pad(scale, padding).T,
    }
    return stored, (codes * scale.float()[:, index] + offset.float()[:, index]).to(weight.dtype)


def made(tmp_path: Path, settings: Any = SETTINGS, **how: Any) -> tuple[Path, Path]:
    return two_folders(tiny_llama(**SIZES), tmp_path, pack, settings, dtype=torch.float16, **how)


def test_it_is_read_and_quantized_as_the_floats_are(tmp_path: Path) -> None:
    coded, plain = made(tmp_path, kept=("o_proj.weight",))
    assert check_read(coded, plain).decoded == "AWQ, 4 bits"
    check_quantized(coded, plain, tmp_path)


@pytest.mark.parametrize("zeros", ["", "qzeros", "scaled_zeros"])
def test_layouts_for_single_tokens(tmp_path: Path, zeros: str) -> None:
    def pack_other(name: str, weight: Tensor) -> Packed:
        return pack_fast(name, weight, zeros) if zeros else pack_gemv(name, weight)

    settings = SETTINGS | {"version": "gemv_fast" if zeros else "gemv"}
    coded, plain = two_folders(tiny_llama(**SIZES), tmp_path, pack_other, settings, dtype=torch.float16)
    assert check_read(coded, plain).decoded == "AWQ, 4 bits"
    change_config(coded, group_size=1)
    with pytest.raises(SourceError, match=r"layer \S+ has qweight .* inputs in groups of 1 make"):
        open_float(coded)


def test_settings_of_older_files(tmp_path: Path) -> None:
    coded, plain = made(tmp_path, None)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (coded / "quant_config.json").write_text(json.dumps(old))
    check_read(coded, plain)


def test_auto_round_writes_it_under_its_own_name(tmp_path: Path) -> None:
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_awq",
        "bits": 4,
        "group_size": 32,
    }
    coded, plain = made(tmp_path, settings)
    check_read(coded, plain)
    change_config(coded, packing_format="auto_round:something")
    with pytest.raises(
        SourceError, match=r"already quantized \(auto-round\), and none of its tensors|auto-round"
    ):
        open_float(coded)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path)

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    change_config(coded, version="exllama")
    refuses("AWQ in the layout exllama with 4 bits; fracbit decodes gemm, gemv, gemv_fast and marlin")
    change_config(coded, version="gemm", bits=3)
    refuses("AWQ in the layout gemm with 3 bits")
    change_config(coded, bits=4, group_size=64)
    refuses(r"scales \[\d+, \d+\], and \d+ inputs in groups of 64 make \d+")
    change_config(coded, group_size=32)
    kept: list[Tensor] = []
    change_tensors(coded, lambda tensors: kept.append(tensors.pop(f"{UP}.scales")))
    refuses(f"lacks {UP}.scales")
    change_tensors(coded, lambda tensors: tensors.update({f"{UP}.scales": kept[0]}))
    change_tensors(coded, lambda tensors: tensors.pop(f"{UP}.qweight"))
    refuses(rf"holds {UP}.(scales|qzeros) and no qweight")
