"""MXFP4 (gpt-oss), decoded while it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fracbit
from families import build, config_of
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import Packed, change_tensors, check_quantized, check_read, two_folders

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 67, "pad_token_id": None, "eos_token_id": 2,
}  # fmt: skip
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DOWN = "model.layers.0.mlp.experts.down_proj"


def pack(name: str, weight: Tensor) -> Packed:
    """[experts, in, out] as blocks of 32 inputs for each output."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, groups, 32]
    power = (groups.abs().amax(-1) / 6).log2().ceil()  # [experts, out, groups]
    codes = (groups[..., None] / torch.exp2(power)[..., None, None] - FP4).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)  # [experts, out, groups, 16]
    value = (FP4[codes] * torch.exp2(power)[..., None]).flatten(2).transpose(1, 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": (power + 127).to(torch.uint8)}, value.to(weight.dtype)


def made(tmp_path: Path, settings: Any = SETTINGS) -> tuple[Path, Path]:
    model = build(config_of("GptOssConfig", **SIZES))

    def which(name: str, tensor: Tensor) -> bool:
        return tensor.dim() == 3

    return two_folders(model, tmp_path, pack, settings, dtype=torch.bfloat16, which=which)


@pytest.mark.parametrize("settings", [SETTINGS, None])
def test_experts_are_read_with_and_without_a_config(tmp_path: Path, settings: Any) -> None:
    found = check_read(*made(tmp_path, settings))
    assert found.decoded == "MXFP4, 4 bits"
    assert len(found.decodings) == 4


def test_they_are_quantized_as_the_floats_are(tmp_path: Path) -> None:
    check_quantized(*made(tmp_path), tmp_path)


def test_a_stack_of_experts_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for every expert."""
    from fracbit.pipeline.quantize import reader

    read: list[str] = []
    plain = reader.read_tensor
    monkeypatch.setattr(
        reader, "read_tensor", lambda source, name: (read.append(name), plain(source, name))[1]
    )
    fracbit.quantize(made(tmp_path)[0], tmp_path / "out", "int4/32", progress=None)
    assert [
        read.count(f"model.layers.{n}.mlp.experts.{leaf}_proj")
        for n in (0, 1)
        for leaf in ("gate_up", "down")
    ] == [1] * 4


def test_transformers_decodes_the_same(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from fracbit.checkpoint.source import read_stored, read_tensor

    source = open_float(made(tmp_path)[0]).source
    theirs = convert_moe_packed_tensors(
        read_stored(source, f"{DOWN}_blocks"), read_stored(source, f"{DOWN}_scales")
    )
    assert torch.equal(theirs, read_tensor(source, DOWN))


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path)

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    kept: list[Tensor] = []
    change_tensors(coded, lambda tensors: kept.append(tensors.pop(f"{DOWN}_scales")))
    refuses(f"holds {DOWN}_blocks and no {DOWN}_scales")
    change_tensors(coded, lambda tensors: tensors.update({f"{DOWN}_scales": kept[0][:, :-1].contiguous()}))
    refuses(rf"{DOWN}_blocks has shape \[3, 64, 3, 16\] and {DOWN}_scales U8 \[3, 63, 3\]")
    change_tensors(coded, lambda tensors: tensors.pop(f"{DOWN}_blocks"))
    refuses(f"holds {DOWN}_scales and no blocks")
