"""compressed-tensors (llm-compressor): packed integers, int8, fp8, NVFP4 and MXFP4, decoded while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
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

FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
UP = "model.layers.0.mlp.up_proj"


def settings(kind: str, bits: int, *, asymmetric: bool = False, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": bits, "type": kind, "symmetric": not asymmetric, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def made(
    tmp_path: Path, pack: Callable[[str, Tensor], Packed], config: dict[str, Any] | None, **how: Any
) -> tuple[Path, Path]:
    sizes = how.pop("sizes", {})
    return two_folders(tiny_llama(**(SIZES | sizes)), tmp_path, pack, config, dtype=torch.bfloat16, **how)


def packer(
    bits: int,
    group: int,
    *,
    asymmetric: bool = False,
    padded: bool = False,
    old_zero: bool = False,
    order: bool = False,
) -> Callable[[str, Tensor], Packed]:
    """A writer of packed integers; `padded`: 32 // bits codes in a word, as before 2026."""

    def words(codes: Tensor) -> Tensor:
        if not padded:
            return stream_of(codes, bits)
        per = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).long().view(len(codes), -1, per)
        return (codes << (torch.arange(per) * bits)).sum(-1).to(torch.int32)

    def pack(name: str, weight: Tensor) -> Packed:
        layer = name.removesuffix(".weight")
        size = min(group, weight.shape[1])
        codes, scale, zero = rounded_groups(weight, bits, size, asymmetric)
        index = torch.arange(weight.shape[1]) // size
        if order:
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
        stored = {
            f"{layer}.weight_packed": words(codes),
            f"{layer}.weight_scale": scale,
            f"{layer}.weight_shape": torch.tensor(weight.shape),
        }
        if asymmetric:
            signed = (zero - 2 ** (bits - 1)).to(torch.int8)
            stored[f"{layer}.weight_zero_point"] = signed if old_zero else words(zero.T).T.contiguous()
        if order:
            stored[f"{layer}.weight_g_idx"] = index.to(torch.int32)
        value = (codes - zero[:, index]) * scale.float()[:, index]
        return stored, value.to(weight.dtype)

    return pack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_integers_of_every_width(tmp_path: Path, bits: int, asymmetric: bool) -> None:
    config = settings("int", bits, asymmetric=asymmetric, strategy="group", group_size=32)
    coded, plain = made(tmp_path, packer(bits, 32, asymmetric=asymmetric), config)
    assert check_read(coded, plain).decoded == f"compressed-tensors int, {bits} bits"


def test_packed_integers_are_quantized_as_the_floats_are(tmp_path: Path) -> None:
    config = settings("int", 4, asymmetric=True, strategy="group", group_size=64)
    coded, plain = made(tmp_path, packer(4, 64, asymmetric=True), config, kept=("down_proj.weight",))
    check_quantized(coded, plain, tmp_path, "int3/32")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_that_do_not_divide_a_word_as_they_were_packed_before(tmp_path: Path, bits: int) -> None:
    config = settings("int", bits, asymmetric=True, strategy="group", group_size=32)
    coded, plain = made(tmp_path, packer(bits, 32, asymmetric=True, padded=True), config)
    check_read(coded, plain)


def test_rows_too_short_to_tell_the_two_packings_apart_are_refused(tmp_path: Path) -> None:
    config = settings("int", 3, strategy="channel")
    sizes = {"hidden_size": 48, "head_dim": 12, "intermediate_size": 64}
    coded, _ = made(tmp_path, packer(3, 10**6), config, sizes=sizes)
    with pytest.raises(SourceError, match="too short to tell one stream of bits from words of 10 codes"):
        open_float(coded)


@pytest.mark.parametrize("how", ["channel", "old zero points", "order"])
def test_other_layouts_of_packed_integers(tmp_path: Path, how: str) -> None:
    channel = how == "channel"
    weights = {"strategy": "channel"} if channel else {"strategy": "group", "group_size": 32}
    config = settings("int", 4, asymmetric=True, **weights)
    pack = packer(
        4, 10**6 if channel else 32, asymmetric=True, old_zero=how.startswith("old"), order=how == "order"
    )
    check_read(*made(tmp_path, pack, config))


def test_groups_of_the_config_are_matched_by_name_then_pattern_then_class(tmp_path: Path) -> None:
    by_bits = {8: packer(8, 32), 3: packer(3, 32), 4: packer(4, 32)}

    def pack(name: str, weight: Tensor) -> Packed:
        bits = 8 if name == f"{UP}.weight" else 3 if "mlp" in name else 4
        return by_bits[bits](name, weight)

    config = settings("int", 4, strategy="group", group_size=32)
    for number, (bits, target) in enumerate([(8, UP), (3, r"re:.*\.mlp\..*")], 1):
        other = settings("int", bits, strategy="group", group_size=32)["config_groups"]["group_0"]
        config["config_groups"][f"group_{number}"] = {**other, "targets": [target]}
    coded, plain = made(tmp_path, pack, {**config, "format": "mixed-precision"})
    assert check_read(coded, plain).decoded == "compressed-tensors int, 3 and 4 and 8 bits"


@pytest.mark.parametrize("strategy", ["channel", "group", "tensor"])
def test_int8(tmp_path: Path, strategy: str) -> None:
    size = 32 if strategy == "group" else 10**6
    asymmetric = strategy == "group"

    def pack(name: str, weight: Tensor) -> Packed:
        codes, scale, zero = rounded_groups(weight, 8, min(size, weight.shape[1]), asymmetric)
        if strategy == "tensor":
            scale = scale.amax().view(1)
            codes = (weight.float() / scale.float()).round().clamp(-128, 127) + 128
        index = torch.arange(weight.shape[1]) // min(size, weight.shape[1])
        signed = (codes - 128).to(torch.int8)
        stored = {name: signed, f"{name}_scale": scale}
        wide = scale.float() if strategy == "tensor" else scale.float()[:, index]
        if asymmetric:
            stored[f"{name}_zero_point"] = (zero - 128).to(torch.int8)
        value = (codes - zero[:, index]) * wide
        return stored, value.to(weight.dtype)

    config = settings(
        "int", 8, asymmetric=asymmetric, strategy=strategy, group_size=32 if size == 32 else None
    )
    config |= {"format": "int-quantized"}
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    coded, plain = made(tmp_path, pack, config)
    found = check_read(coded, plain)
    assert any("activations" in note for note in found.notes)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_fp8(tmp_path: Path, strategy: str) -> None:
    def pack(name: str, weight: Tensor) -> Packed:
        if strategy == "tensor":
            scale = (weight.float().abs().max() / 448).view(1).to(weight.dtype)
            wide = scale
        elif strategy == "channel":
            scale = wide = (weight.float().abs().amax(1, keepdim=True) / 448).to(weight.dtype)
        else:
            blocks = [part.split(64, 1) for part in weight.float().abs().split(64)]
            scale = (
                torch.stack([torch.stack([block.max() for block in row]) for row in blocks]).to(weight.dtype)
                / 448
            )
            wide = scale.repeat_interleave(64, 0)[: len(weight)].repeat_interleave(64, 1)[
                :, : weight.shape[1]
            ]
        codes = (weight.float() / wide.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {
            name: codes,
            f"{name}_scale": scale,
            f"{name.removesuffix('.weight')}.input_scale": torch.ones(1),
        }
        return stored, (codes.float() * wide.float()).to(weight.dtype)

    block = {"block_structure": [64, 64]} if strategy == "block" else {}
    config = settings("float", 8, strategy=strategy, **block) | {"format": "float-quantized"}
    coded, plain = made(tmp_path, pack, config)
    assert check_read(coded, plain).decoded == "compressed-tensors fp8, 8 bits"


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_floats_of_four_bits(tmp_path: Path, kind: str) -> None:
    group = 16 if kind == "nvfp4" else 32

    def pack(name: str, weight: Tensor) -> Packed:
        layer = name.removesuffix(".weight")
        amax = weight.float().unflatten(1, (-1, group)).abs().amax(-1)  # [out, groups]
        stored: dict[str, Tensor] = {}
        if kind == "nvfp4":
            whole = (448 * 6 / amax.max()).view(1)
            stored_scale = (amax / 6 * whole).to(torch.float8_e4m3fn)
            scale = stored_scale.float() / whole
            stored[f"{layer}.weight_global_scale"] = whole
        else:
            power = (amax / 6).log2().ceil()
            stored_scale = (power + 127).to(torch.uint8)
            scale = torch.exp2(power)
        wide = scale.repeat_interleave(group, 1)
        codes = (weight.float()[..., None] / wide[..., None] - FP4).abs().argmin(-1)  # [out, in]
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        stored |= {f"{layer}.weight_packed": packed, f"{layer}.weight_scale": stored_scale}
        return stored, (FP4[codes] * wide).to(weight.dtype)

    config = settings("float", 4, strategy="tensor_group", group_size=group)
    coded, plain = made(tmp_path, pack, config | {"format": f"{kind}-pack-quantized"})
    assert check_read(coded, plain).decoded == f"compressed-tensors {kind}, 4 bits"
    check_quantized(coded, plain, tmp_path)


def test_a_config_of_version_0_2_is_read(tmp_path: Path) -> None:
    """compression_config held the quantization_config."""
    config = settings("int", 4, strategy="group", group_size=32)
    key, old = "compression_config", {"quantization_config": config, "sparsity_config": None}
    check_read(*made(tmp_path, packer(4, 32), old, key=key))


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    config = settings("int", 4, asymmetric=True, strategy="group", group_size=32)
    coded, _ = made(tmp_path, packer(4, 32, asymmetric=True), config)

    def refuses(says: str) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(coded)

    change_config(coded, format="marlin-24")
    refuses("format marlin-24; fracbit decodes pack-quantized, ")
    change_config(coded, format="pack-quantized", sparsity_config={"format": "sparse-24-bitmask"})
    refuses("format sparse-24-bitmask")
    change_config(coded, sparsity_config=None, transform_config={"config_groups": {"R1": {}}})
    refuses("rotated before")
    groups = config["config_groups"]
    change_config(coded, transform_config=None, config_groups={})
    refuses("no config_groups")
    change_config(coded, config_groups={"g": {**groups["group_0"], "targets": ["re:.*mlp.*"]}})
    refuses("no group of config_groups has weights for it")
    for weights, says in (
        ({"num_bits": 3}, r"weight_packed \[\d+, \d+\], and \d+ x \d+ codes of 3 bits take"),
        ({"group_size": 64}, r"weight_scale \[\d+, \d+\], which is no grid"),
        ({"type": "float"}, "config.json calls them float of 4 bits"),
    ):
        changed = {**groups["group_0"], "weights": {**groups["group_0"]["weights"], **weights}}
        change_config(coded, config_groups={"g": changed})
        refuses(says)
    change_config(coded, config_groups=groups)
    for ending in ("weight_scale", "weight_shape", "weight_zero_point"):
        kept: list[Tensor] = []
        change_tensors(coded, lambda tensors: kept.append(tensors.pop(f"{UP}.{ending}")))  # noqa: B023
        refuses(f"layer {UP} has no {UP}.{ending}")
        change_tensors(coded, lambda tensors: tensors.update({f"{UP}.{ending}": kept[0]}))  # noqa: B023
    change_tensors(coded, lambda tensors: tensors.update({f"{UP}.weight": torch.ones(192, 128)}))
    refuses(f"holds {UP}.weight as a plain tensor and as codes")
    change_tensors(
        coded, lambda tensors: [tensors.pop(f"{UP}.weight_packed"), tensors.pop(f"{UP}.weight_shape")]
    )
    refuses(rf"holds {UP}.weight_\w+, and no codes that belong to it")
    path = coded / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"})
    )
    refuses("no config_groups that say their bits")
