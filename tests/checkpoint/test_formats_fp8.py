"""Block fp8 (DeepSeek): codes and grids of scales, decoded while they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import build, config_of, tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_config, change_tensors, check_quantized, check_read, two_folders

SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
EXPERTS = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"


def pack(name: str, weight: Tensor, block: tuple[int, int] = (128, 128)) -> Packed:
    """Blocks with a scale each, the last ones short; decoded number by number."""
    out, width = weight.shape
    codes = torch.empty(out, width, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-out // block[0]), -(-width // block[1]))
    value = torch.empty(out, width)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = (slice(k * size, (k + 1) * size) for k, size in zip((i, j), block, strict=True))
            scales[i, j] = weight[rows, columns].float().abs().max() / 448
            codes[rows, columns] = (weight[rows, columns].float() / scales[i, j]).to(torch.float8_e4m3fn)
            value[rows, columns] = codes[rows, columns].float() * scales[i, j]
    return {name: codes, f"{name}_scale_inv": scales}, value.to(weight.dtype)


def folders(tmp_path: Path, **how: object) -> tuple[Path, Path]:
    model = tiny_llama(**SIZES)
    return two_folders(model, tmp_path, pack, SETTINGS, dtype=torch.bfloat16, **how)  # type: ignore[arg-type]


def test_blocks_with_short_ends_are_read_and_quantized(tmp_path: Path) -> None:
    coded, plain = folders(tmp_path)
    source = check_read(coded, plain)
    assert source.decoded == "block fp8, 8 bits"
    assert check_quantized(coded, plain, tmp_path)["source"]["decoded"] == source.decoded


def test_layers_that_are_not_converted_stay_plain(tmp_path: Path) -> None:
    coded, plain = folders(tmp_path, kept=("down_proj.weight",))
    source = check_read(coded, plain)
    assert "model.layers.0.mlp.down_proj.weight" not in source.decodings


def test_a_config_that_lost_its_quantization_is_seen_by_its_tensors(tmp_path: Path) -> None:
    coded, plain = two_folders(tiny_llama(**SIZES), tmp_path, pack, None, dtype=torch.bfloat16)
    assert any("says nothing of a quantization" in note for note in check_read(coded, plain).notes)


@pytest.mark.parametrize("kind", ["tensor", "scalar", "row", "power", "static"])
def test_other_grids_of_scales(tmp_path: Path, kind: str) -> None:
    def stored(name: str, weight: Tensor) -> Packed:
        amax = weight.float().abs().amax(1, keepdim=True) if kind == "row" else weight.float().abs().max()
        scale = amax / 448
        scale = torch.exp2(scale.log2().ceil()) if kind == "power" else scale
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        value = (codes.float() * scale).to(weight.dtype)
        scale = scale.view(1) if kind == "tensor" else scale
        scale = scale.view(1, 1).to(torch.float8_e8m0fnu) if kind == "power" else scale
        beside = f"{name}_scale" if kind == "static" else f"{name}_scale_inv"
        extra = {f"{name.removesuffix('.weight')}.input_scale": torch.ones(())} if kind == "static" else {}
        return {name: codes, beside: scale, **extra}, value

    settings = {name: value for name, value in SETTINGS.items() if name != "weight_block_size"}
    coded, plain = two_folders(tiny_llama(**SIZES), tmp_path, stored, settings, dtype=torch.bfloat16)
    check_read(coded, plain)


def test_experts_in_one_stack(tmp_path: Path) -> None:
    """As transformers saves them: a grid of scales for each expert."""
    model = build(config_of("Qwen3MoeConfig", **(SIZES | EXPERTS))).to(torch.bfloat16)

    def pack_stack(name: str, weight: Tensor) -> Packed:
        if weight.dim() == 2:
            return pack(name, weight, (64, 64))
        packed = [pack(name, each, (64, 64)) for each in weight]
        stored = {key: torch.stack([parts[key] for parts, _ in packed]) for key in packed[0][0]}
        return stored, torch.stack([value for _, value in packed])

    def which(name: str, tensor: Tensor) -> bool:
        return ".experts." in name

    plain_save = type(model).save_pretrained
    settings = SETTINGS | {"weight_block_size": [64, 64]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model),
            "save_pretrained",
            lambda self, where: plain_save(self, where, save_original_format=False),
        )
        coded, plain = two_folders(model, tmp_path, pack_stack, settings, which=which)
    found = check_read(coded, plain)
    assert len(found.decodings) == 4
    check_quantized(coded, plain, tmp_path)


def test_a_mixture_in_deepseeks_names(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 32,
    }  # fmt: skip
    model = build(config_of("DeepseekV3Config", **sizes)).to(torch.bfloat16)
    coded, plain = two_folders(model, tmp_path, pack, SETTINGS, kept=("mlp.gate.weight",))
    source = check_read(coded, plain)
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in source.decodings
    check_quantized(coded, plain, tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = folders(tmp_path)

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    scale = f"{UP}_scale_inv"
    change_config(coded, weight_block_size=[64, 64])
    refuses(r"down_proj.weight_scale_inv has shape \[1, 2\].*in blocks of \[64, 64\]")
    change_config(coded, weight_block_size=[128, 128])
    change_tensors(coded, lambda tensors: tensors.update({scale: torch.ones(3, 5)}))
    refuses(rf"{scale} has shape \[3, 5\]")
    change_tensors(coded, lambda tensors: tensors.pop(scale))
    refuses(f"{UP} in F8_E4M3 and no {scale}")
    change_tensors(
        coded, lambda tensors: tensors.update({UP: torch.zeros(192, 128), scale: torch.ones(2, 1)})
    )
    refuses(f"holds {scale} and no 8-bit floats")


def test_a_decoded_shape_that_the_model_does_not_have(tmp_path: Path) -> None:
    coded, _ = folders(tmp_path)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    with pytest.raises(SourceError, match=r"is decoded \(block fp8, 8 bits\) to \[\d+, \d+\]"):
        open_float(coded)
