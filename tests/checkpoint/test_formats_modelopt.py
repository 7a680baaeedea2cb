"""ModelOpt and Quark: small floats and integers by the tensors beside them, decoded while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import build, config_of, tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_tensors, check_quantized, check_read, two_folders

UP = "model.layers.0.mlp.up_proj"
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SETTINGS = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"]}
SMALL = SIZES | {"num_hidden_layers": 1}


def nibbles(codes: Tensor) -> Tensor:
    """Two codes in a byte along the last axis, the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def small(weight: Tensor, size: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of E2M1 and their values, with a scale for `size` inputs."""
    each = scale.repeat_interleave(size, -1)
    codes = (weight.float() / each)[..., None].sub(FP4).abs().argmin(-1)
    return codes, FP4[codes] * each


def nvfp4(name: str, weight: Tensor) -> Packed:
    double = weight.float().abs().amax() / (6 * 448)
    scale = (weight.float().unflatten(-1, (-1, 16)).abs().amax(-1) / 6 / double).to(torch.float8_e4m3fn)
    codes, value = small(weight, 16, scale.float() * double)
    stored = {
        name: nibbles(codes),
        beside(name, "weight_scale"): scale,
        beside(name, "weight_scale_2"): double,
    }
    return stored | {beside(name, "input_scale"): torch.ones(())}, value.to(weight.dtype)


def mxfp4(name: str, weight: Tensor) -> Packed:
    power = (weight.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 6).log2().ceil()
    codes, value = small(weight, 32, torch.exp2(power))
    return {name: nibbles(codes), beside(name, "weight_scale"): (power + 127).byte()}, value.to(weight.dtype)


def mxfp8(name: str, weight: Tensor) -> Packed:
    power = (weight.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 448).log2().ceil()
    each = torch.exp2(power).repeat_interleave(32, -1)
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    return {name: codes, beside(name, "weight_scale"): (power + 127).byte()}, (codes.float() * each).to(
        weight.dtype
    )


def fp8(rows: bool) -> Callable[[str, Tensor], Packed]:
    def pack(name: str, weight: Tensor) -> Packed:
        scale = (weight.float().abs().amax(-1) if rows else weight.float().abs().amax()) / 448
        each = scale[..., None] if rows else scale
        codes = (weight.float() / each).to(torch.float8_e4m3fn)
        return {name: codes, beside(name, "weight_scale"): scale}, (codes.float() * each).to(weight.dtype)

    return pack


def fp8_blocks(name: str, weight: Tensor) -> Packed:
    out, width = weight.shape
    scale = torch.rand(-(-out // 128), 1, -(-width // 128), 1) + 0.5
    each = scale[:, 0, :, 0].repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :width]
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    return {name: codes, beside(name, "weight_scale"): scale}, (codes.float() * each).to(weight.dtype)


def int8(name: str, weight: Tensor) -> Packed:
    inputs = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    scale = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scale[:, None]).round().to(torch.int8)
    stored = {name: codes, beside(name, "weight_scale"): scale, beside(name, "pre_quant_scale"): inputs}
    return stored, (codes.float() * scale[:, None] * inputs).to(weight.dtype)


def awq(name: str, weight: Tensor) -> Packed:
    """Outputs in pairs; a second scale that is for the inputs alone."""
    scale = weight.float().unflatten(1, (-1, 32)).abs().amax(-1) / 7
    each = scale.repeat_interleave(32, 1)
    codes = (weight.float() / each).round().clamp(-8, 7) + 0.0  # no -0
    inputs = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    stored = {
        name: nibbles((codes.int() & 15).T).T, beside(name, "weight_scale"): scale,
        beside(name, "weight_scale_2"): torch.ones(()), beside(name, "pre_quant_scale"): inputs,
    }  # fmt: skip
    return stored, (codes * each * inputs).to(weight.dtype)


def svdquant(name: str, weight: Tensor) -> Packed:
    """NVFP4 with two narrow matrices beside it, both behind a scale of the inputs."""
    stored, value = nvfp4(name, weight.float())
    some = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(size, generator=some).to(weight.dtype)
        for size in ((4, weight.shape[1]), (weight.shape[0], 4))
    )
    inputs = torch.rand(weight.shape[1], generator=some) + 0.5
    stored |= {beside(name, "svdquant_lora_a"): a, beside(name, "svdquant_lora_b"): b}
    stored |= {beside(name, "pre_quant_scale"): inputs}
    return stored, ((value + b.float() @ a.float()) * inputs).to(weight.dtype)


def beside(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}" if name.endswith(".weight") else f"{name}_{part}"


KINDS = {
    "NVFP4": nvfp4, "MXFP4": mxfp4, "MXFP8": mxfp8, "FP8": fp8(False), "FP8 rows": fp8(True), "FP8 blocks": fp8_blocks,
    "INT8": int8, "INT4": awq, "NVFP4 svd": svdquant,
}  # fmt: skip


def made(
    tmp_path: Path, pack: Callable[[str, Tensor], Packed], settings: Any = SETTINGS
) -> tuple[Path, Path]:
    return two_folders(tiny_llama(**SMALL), tmp_path, pack, settings, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_codes(tmp_path: Path, kind: str) -> None:
    assert check_read(*made(tmp_path, KINDS[kind])).decoded == f"ModelOpt {kind.split()[0]}"


def mixed(name: str, weight: Tensor) -> Packed:
    return (nvfp4 if "mlp" in name else fp8(False))(name, weight)


@pytest.mark.parametrize("where", ["config", "hf_quant_config", "nowhere"])
def test_kinds_are_mixed_and_quantized_as_the_floats_are(tmp_path: Path, where: str) -> None:
    """Older releases say it in a file of their own."""
    coded, plain = made(tmp_path, mixed, SETTINGS if where == "config" else None)
    if where == "hf_quant_config":
        entry = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}
        (coded / "hf_quant_config.json").write_text(json.dumps(entry))
    source = check_read(coded, plain)
    assert source.decoded == "ModelOpt FP8, NVFP4"
    assert any("rounds the activations" in note for note in source.notes)
    if where == "hf_quant_config":
        check_quantized(coded, plain, tmp_path)


def test_quark_writes_some_of_them_under_its_own_name(tmp_path: Path) -> None:
    check_read(*made(tmp_path, mxfp4, {"quant_method": "quark", "export": {"pack_method": "reorder"}}))


@pytest.mark.parametrize("pack", [nvfp4, mxfp4, fp8(False), fp8(True)])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_stack(tmp_path: Path, pack: Callable[[str, Tensor], Packed], turned: bool) -> None:
    """[experts, out, in], or [experts, in, out] with the codes of the inputs in one byte all the same."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": 2}
    kind = "GptOssConfig" if turned else "Qwen3MoeConfig"
    more = {
        "num_experts": 3,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | sizes
    model = build(config_of(kind, **(SMALL | {"intermediate_size": 96} | more)))

    def stack(name: str, weight: Tensor) -> Packed:
        parts, value = pack(name, weight.transpose(1, 2) if turned else weight)
        if not turned:
            return parts, value
        both = (name, beside(name, "weight_scale"))
        return {
            each: part.transpose(1, 2) if each in both and part.dim() == 3 else part
            for each, part in parts.items()
        }, value.transpose(1, 2)

    plain_save = type(model).save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model),
            "save_pretrained",
            lambda self, where: plain_save(self, where, save_original_format=False),
        )
        which = lambda name, tensor: ".experts." in name and tensor.dim() == 3  # noqa: E731
        folders = two_folders(model, tmp_path, stack, SETTINGS, dtype=torch.bfloat16, which=which)
    assert len(check_read(*folders).decodings) == 2


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path, nvfp4)

    def changed(says: str, **tensors: Tensor | None) -> None:
        kept: dict[str, Tensor] = {}

        def change(stored: dict[str, Tensor]) -> None:
            kept.update({name: stored.pop(name) for part in tensors if (name := f"{UP}.{part}") in stored})
            stored.update({f"{UP}.{part}": tensor for part, tensor in tensors.items() if tensor is not None})

        change_tensors(coded, change)
        with pytest.raises(SourceError, match=says):
            open_float(coded)
        change_tensors(coded, lambda stored: [stored.pop(f"{UP}.{part}", None) for part in tensors])
        change_tensors(coded, lambda stored: stored.update(kept))

    changed(rf"{UP}\.weight is U8, and there is no {UP}\.weight_scale", weight_scale=None)
    changed(rf"F8_E4M3 \[192, 8\] and no {UP}\.weight_scale_2", weight_scale_2=None)
    short = torch.ones(192, 4).to(torch.float8_e4m3fn)
    changed(r"is U8 \[192, 64\] with scales F8_E4M3 \[192, 4\]", weight_scale=short)
    changed(r"integers of 4 bits are \[out / 2, in\]", weight_scale=torch.ones(192, 4))
    changed(rf"holds {UP}\.(weight_scale|weight_scale_2) and no codes", weight=torch.ones(192, 128))
    changed(r"128 inputs and a pre_quant_scale \[64\]", pre_quant_scale=torch.ones(64))
    changed("svdquant_lora_a and _b", svdquant_lora_a=torch.ones(4, 8), svdquant_lora_b=torch.ones(192, 4))
    codes = torch.ones(192, 128).to(torch.float8_e4m3fn)
    changed(
        r"\[192, 128\] and \S+weight_scale \[7\], which is no grid", weight=codes, weight_scale=torch.ones(7)
    )
