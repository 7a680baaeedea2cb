"""torchao's tensor classes, taken apart in safetensors, decoded while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from rounded import SIZES, change_tensors, check_quantized, check_read, two_folders

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Made = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]
"""A class, its attributes, its tensors, and the weight that they stand for."""


def typed(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def float8(weight: Tensor, block: tuple[int, int]) -> Made:
    out, width = weight.shape
    block = (min(block[0], out), min(block[1], width))
    scale = torch.rand(-(-out // block[0]), -(-width // block[1])) + 0.5
    each = scale.repeat_interleave(block[0], 0)[:out].repeat_interleave(block[1], 1)[:, :width]
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    return "Float8Tensor", {"block_size": list(block)}, {"qdata": codes, "scale": scale}, codes.float() * each


def int8(
    weight: Tensor, group: int = 32, kind: str = "IntxUnpackedToInt8Tensor", inputs: bool = False
) -> Made:
    """Zero points are subtracted in the type of the weight."""
    parts = weight.float().unflatten(1, (-1, group))
    scale = ((parts.amax(-1) - parts.amin(-1)) / 15).to(weight.dtype)
    zero = (-8 - parts.amin(-1) / scale.float()).round().clamp(-8, 7)
    codes = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(-8, 7) + 0.0  # no -0
    value = ((codes - zero[..., None]).to(weight.dtype) * scale[..., None]).flatten(1)
    tensors = {"qdata": codes.flatten(1).to(torch.int8), "scale": scale, "zero_point": zero.to(torch.int8)}
    if inputs:
        tensors["act_pre_scale"] = torch.linspace(0.5, 2, weight.shape[1]).to(weight.dtype)
        value = value.float() * tensors["act_pre_scale"].float()
    tensors |= {"act_quant_scale": torch.ones(1)} if inputs else {}
    return kind, {"block_size": [1, group], "dtype": typed(weight.dtype)}, tensors, value


def floated(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes 0 .. 15 [out, in], scales and offsets [out, groups], and (code - 8) * scale + offset."""
    parts = weight.float().unflatten(1, (-1, group))
    scale = ((parts.amax(-1) - parts.amin(-1)) / 15).clamp(min=1e-6).to(weight.dtype)
    offset = (parts.amin(-1) + 8 * scale.float()).to(weight.dtype)
    codes = ((parts - offset.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    value = (codes - 8) * scale.float()[..., None] + offset.float()[..., None]
    return codes.flatten(1).long(), scale, offset, value.flatten(1)


def int4(weight: Tensor, group: int = 32) -> Made:
    codes, scale, offset, value = floated(weight, group)
    signed = codes - 8 & 15
    packed = (signed[:, 0::2] | signed[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    tensors = {"qdata": packed, "scale": scale.T, "zero_point": offset.T}
    return "Int4Tensor", {"block_size": [1, group], "shape": list(weight.shape)}, tensors, value


def tiles(weight: Tensor, group: int = 64) -> Made:
    """As CUDA's _convert_weight_to_int4pack lays it out: 32 threads, thread t with output t / 4 of eight."""
    out, width = weight.shape
    wide = -(-width // 1024) * 1024
    tall = torch.zeros(-(-out // 8) * 8, wide, dtype=weight.dtype)
    tall[:out, :width] = weight
    codes, scale, offset, value = floated(tall, group)
    numbers, found = codes.tolist(), []
    for n in range(len(tall) // 8):
        for k in range(wide // 128):
            for t in range(32):
                row = numbers[8 * n + t // 4]
                for pair in range(4):
                    base = 128 * k + 32 * pair + 2 * (t % 4)
                    first, second = ([row[base + 8 * i + half] for i in range(4)] for half in (0, 1))
                    word = sum(code << 4 * place for place, code in enumerate(first + second))
                    found.append(word - 2**32 if word >= 2**31 else word)
    qdata = torch.tensor(found, dtype=torch.int32).view(len(tall) // 8, wide // 128, 32, 4)
    tensors = {"qdata": qdata, "scale_and_zero": torch.stack([scale.T, offset.T], -1)}
    data = {"block_size": [1, group], "shape": [out, width]}
    return "Int4TilePackedTo4dTensor", data, tensors, value[:out, :width]


def tiled(scale: Tensor) -> Tensor:
    """Rows in tiles of 128 rows by 4 columns: row 32 a + b of a tile becomes four columns a of its row b."""
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    tall = torch.zeros(128 * rows, 4 * columns, dtype=torch.uint8)
    tall[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    blocks = [
        torch.cat([block[32 * a : 32 * a + 32] for a in range(4)], 1)
        for line in tall.split(128)
        for block in line.split(4, 1)
    ]
    return torch.cat([block.flatten() for block in blocks]).view(32 * rows, 16 * columns).view(scale.dtype)


def nvfp4(weight: Tensor, swizzled: bool, whole: bool = True) -> Made:
    double = weight.float().abs().amax() / (6 * 448) if whole else torch.ones(())
    scale = (weight.float().unflatten(1, (-1, 16)).abs().amax(-1) / 6 / double).to(torch.float8_e4m3fn)
    each = (double * scale.float()).repeat_interleave(16, 1)
    codes = (weight.float() / each.clamp(min=1e-9))[..., None].sub(FP4).abs().argmin(-1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    tensors = {"qdata": packed, "scale": tiled(scale) if swizzled else scale}
    tensors |= {"per_tensor_scale": double} if whole else {}
    data = {"block_size": 16, "orig_dtype": typed(weight.dtype), "is_swizzled_scales": swizzled}
    return "NVFP4Tensor", data, tensors, FP4[codes] * each


def mx(weight: Tensor, bits: int, swizzled: bool = False) -> Made:
    largest = 6 if bits == 4 else 448
    power = (weight.float().unflatten(1, (-1, 32)).abs().amax(-1) / largest).log2().ceil()
    each = torch.exp2(power).repeat_interleave(32, 1)
    scale = (power + 127).byte().view(torch.float8_e8m0fnu)
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    value = codes.float() * each
    if bits == 4:
        places = (weight.float() / each)[..., None].sub(FP4).abs().argmin(-1)
        codes, value = (places[:, 0::2] | places[:, 1::2] << 4).to(torch.uint8), FP4[places] * each
    data = {"block_size": 32, "orig_dtype": typed(weight.dtype), "is_swizzled_scales": swizzled}
    return "MXTensor", data, {"qdata": codes, "scale": tiled(scale) if swizzled else scale}, value


CLASSES: Mapping[str, Callable[[Tensor], Made]] = {
    "float8 by row": lambda weight: float8(weight, (1, 1 << 20)),
    "float8 by block": lambda weight: float8(weight, (64, 64)),
    "float8 whole": lambda weight: float8(weight, (1 << 20, 1 << 20)),
    "int8": lambda weight: int8(weight, weight.shape[1], "Int8Tensor", inputs=True),
    "intx": int8,
    "int4": int4,
    "tiles": tiles,
    "nvfp4": lambda weight: nvfp4(weight, swizzled=False),
    "nvfp4 in tiles": lambda weight: nvfp4(weight, swizzled=True),
    "nvfp4 without one scale": lambda weight: nvfp4(weight, swizzled=False, whole=False),
    "mxfp8": lambda weight: mx(weight, 8),
    "mxfp8 in tiles": lambda weight: mx(weight, 8, swizzled=True),
    "mxfp4": lambda weight: mx(weight, 4),
}


def made(tmp_path: Path, of: Callable[[Tensor], Made]) -> tuple[Path, Path]:
    metadata: dict[str, str] = {"format": "pt"}

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        kind, data, tensors, value = of(weight)
        module, _, own = name.rpartition(".")
        metadata[name] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(tensors)})
        return {f"{module}._{own}_{part}": tensor for part, tensor in tensors.items()}, value.to(weight.dtype)

    model = tiny_llama(**SIZES | {"num_hidden_layers": 1})
    coded, plain = two_folders(model, tmp_path, pack, SETTINGS, dtype=torch.bfloat16)
    metadata["tensor_names"] = json.dumps([name for name in metadata if name != "format"])
    save_file(load_file(coded / "model.safetensors"), coded / "model.safetensors", metadata=metadata)
    return coded, plain


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class(tmp_path: Path, kind: str) -> None:
    assert check_read(*made(tmp_path, CLASSES[kind])).decoded.startswith("torchao ")


def test_it_is_quantized_as_the_floats_are(tmp_path: Path) -> None:
    check_quantized(*made(tmp_path, int4), tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    """A tensor that is saved again without the header's metadata is one of them."""
    coded, _ = made(tmp_path, lambda weight: ("Int4PreshuffledTensor", *int4(weight)[1:]))
    with pytest.raises(
        SourceError, match=r"is a Int4PreshuffledTensor of torchao; fracbit decodes Float8Tensor"
    ):
        open_float(coded)
    coded, _ = made(tmp_path, int4)
    short = torch.ones(2, 192, dtype=torch.bfloat16)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}._weight_scale"] = short

    header = load_header(coded)
    change_tensors(coded, change)
    with pytest.raises(SourceError, match=r"holds codes of torchao for \S+, and the metadata in the header"):
        open_float(coded)
    save_file(load_file(coded / "model.safetensors"), coded / "model.safetensors", metadata=header)
    with pytest.raises(
        SourceError, match=rf"{UP}\.weight is a Int4Tensor with qdata I8 \[192, 64\], scale BF16 \[2, 192\]"
    ):
        open_float(coded)


def load_header(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict(file.metadata())
