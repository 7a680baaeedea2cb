"""GPTQ, versions 1 and 2, decoded while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import model_of, tiny_llama
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


def settings(bits: int, group: int = 32, version: str = "gptq_v2", **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version, **more}


def packer(
    bits: int,
    group: int = 32,
    *,
    version: int = 2,
    order: bool = False,
    index: bool = True,
    turned: bool = False,
) -> Callable[[str, Tensor], Packed]:
    """A writer of the format; `order`: inputs are sorted into groups at random; `turned`: weights come as [in, out]."""

    def pack(name: str, weight: Tensor) -> Packed:
        layer = name.removesuffix(".weight")
        upright = weight.T if turned else weight  # [out, in]
        size = group if group > 0 else upright.shape[1]
        codes, scale, zero = rounded_groups(upright, bits, size, asymmetric=True)
        zero = zero.clamp(min=1)  # 0 has no code in version 1
        groups = torch.arange(upright.shape[1]) // size
        if order:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        stored = {
            f"{layer}.qweight": stream_of(codes, bits).T,
            f"{layer}.qzeros": stream_of((zero - int(version == 1)).T, bits),
            f"{layer}.scales": scale.T,
        }
        if index:
            stored[f"{layer}.g_idx"] = groups.to(torch.int32)
        value = ((codes - zero[:, groups]) * scale.float()[:, groups]).to(weight.dtype)
        return stored, value.T if turned else value

    return pack


def made(tmp_path: Path, pack: Callable[[str, Tensor], Packed], config: Any, **how: Any) -> tuple[Path, Path]:
    return two_folders(tiny_llama(**SIZES), tmp_path, pack, config, dtype=torch.float16, **how)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_of_every_width(tmp_path: Path, bits: int, version: int) -> None:
    name = "gptq" if version == 1 else "gptq_v2"
    coded, plain = made(tmp_path, packer(bits, version=version), settings(bits, version=name))
    assert check_read(coded, plain).decoded == f"GPTQ version {version}, {bits} bits"


@pytest.mark.parametrize(("packing", "version"), [("auto_round", 2), ("auto_round:auto_gptq", 1)])
def test_auto_round_writes_both_under_its_own_name(tmp_path: Path, packing: str, version: int) -> None:
    config = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": False,
    }
    coded, plain = made(tmp_path, packer(4, version=version, index=False), config)
    assert check_read(coded, plain).decoded == f"GPTQ version {version}, 4 bits"


def test_sorted_inputs_are_quantized_as_the_floats_are(tmp_path: Path) -> None:
    coded, plain = made(
        tmp_path, packer(4, order=True), settings(4, desc_act=True), kept=("down_proj.weight",)
    )
    check_read(coded, plain)
    check_quantized(coded, plain, tmp_path)


@pytest.mark.parametrize("group", [-1, 64])
def test_groups_without_an_index(tmp_path: Path, group: int) -> None:
    check_read(*made(tmp_path, packer(4, group, index=False), settings(4, group)))


def test_widths_of_layers_that_differ_from_the_configs(tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> Packed:
        return packer(8 if "down" in name else 4)(name, weight)

    coded, plain = made(tmp_path, pack, settings(4, dynamic={r"+:.*\.down.*": {"bits": 8}}))
    assert check_read(coded, plain).decoded == "GPTQ version 2, 4 and 8 bits"
    change_config(coded, dynamic=None)
    with pytest.raises(SourceError, match=r"down_proj\.qzeros has shape .*does not fit 4 bits"):
        open_float(coded)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    coded, plain = made(tmp_path, packer(4, version=1), None)
    with pytest.raises(SourceError, match=r"says of which version"):
        open_float(coded)
    (coded / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert check_read(coded, plain).decoded == "GPTQ version 1, 4 bits"


def test_layers_that_store_their_weight_as_in_by_out(tmp_path: Path) -> None:
    """GPT-2's Conv1D: the format holds [out, in] all the same."""
    model = model_of("gpt2", n_embd=64, n_inner=96, vocab_size=67)
    coded, plain = two_folders(model, tmp_path, packer(4, turned=True), settings(4), dtype=torch.float16)
    check_read(coded, plain)
    check_quantized(coded, plain, tmp_path)


def test_zero_points_of_version_1_wrap_within_their_bits(tmp_path: Path) -> None:
    """A zero point of 0 was stored as 15 by writers that masked it; readers add 1 and mask."""

    def pack(name: str, weight: Tensor) -> Packed:
        stored = packer(4, version=1)(name, weight)[0]
        layer = name.removesuffix(".weight")
        zeros = torch.full((stored[f"{layer}.scales"].shape), 15)
        codes = torch.arange(weight.numel()).view(weight.shape) % 16
        stored |= {f"{layer}.qweight": stream_of(codes, 4).T, f"{layer}.qzeros": stream_of(zeros, 4)}
        index = torch.arange(weight.shape[1]) // 32
        return stored, (codes * stored[f"{layer}.scales"].T.float()[:, index]).to(weight.dtype)

    check_read(*made(tmp_path, pack, settings(4, version="gptq")))


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path, packer(4), settings(4))

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    change_config(coded, checkpoint_format="bitblas")
    refuses("in the layout bitblas; fracbit decodes gptq, gptq_v2 and marlin")
    change_config(coded, checkpoint_format="gptq", is_marlin_format=True)
    refuses(r"Marlin's are I32 \[in / 16, 2 out\]")
    change_config(coded, is_marlin_format=None, bits=3)
    refuses(r"qzeros has shape \[\d+, \d+\], which does not fit 3 bits and \d+ outputs")
    change_config(coded, bits=4)
    for ending in ("qzeros", "scales"):
        kept: list[Tensor] = []
        change_tensors(coded, lambda tensors: kept.append(tensors.pop(f"{UP}.{ending}")))  # noqa: B023
        refuses(f"lacks {UP}.{ending}")
        change_tensors(coded, lambda tensors: tensors.update({f"{UP}.{ending}": kept[0]}))  # noqa: B023
    change_tensors(coded, lambda tensors: tensors.pop(f"{UP}.g_idx"))
    change_config(coded, desc_act=True)
    refuses(rf"lacks {UP}.g_idx, and its config says that inputs were sorted")
    change_config(coded, desc_act=None, group_size=64)
    refuses(rf"{UP}.scales has 4 groups, and 128 inputs in groups of 64 make 2")
    change_config(coded, group_size=32)
    change_tensors(
        coded, lambda tensors: tensors.update({f"{UP}.qweight": tensors[f"{UP}.qweight"][:, :-8].clone()})
    )
    refuses(rf"layer {UP} has qweight \[16, 184\]")
    change_tensors(coded, lambda tensors: tensors.pop(f"{UP}.qweight"))
    refuses(rf"holds {UP}.(scales|qzeros) and no qweight")


def test_an_index_of_groups_that_are_not_there(tmp_path: Path) -> None:
    from fracbit.checkpoint.source import read_tensor

    coded, _ = made(tmp_path, packer(4), settings(4))
    change_tensors(coded, lambda tensors: tensors[f"{UP}.g_idx"].fill_(9))
    with pytest.raises(SourceError, match=rf"{UP}.g_idx names groups 9 to 9, and there are 4"):
        read_tensor(open_float(coded).source, f"{UP}.weight")
