"""bitsandbytes, 4 and 8 bits, decoded while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import model_of, tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import read_tensor
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_tensors, check_quantized, check_read, two_folders

SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TABLE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""NF4: the library uses it whatever a file holds."""
UP = "model.layers.0.mlp.up_proj.weight"
ODD = {
    "hidden_size": 40,
    "intermediate_size": 54,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
"""Widths that blocks of 64 do not divide: blocks run through the ends of rows."""


def packer(block: int = 64, nested: int = 0, turned: bool = False) -> Callable[[str, Tensor], Packed]:
    """A writer of 4 bits; `nested`: magnitudes are in 8 bits, in blocks of so many; `turned`: weights come as [in, out]."""

    def pack(name: str, weight: Tensor) -> Packed:
        upright = (weight.T if turned else weight).float()  # [out, in]
        flat = upright.flatten()
        place = torch.arange(len(flat)) // block
        largest = torch.zeros(int(place[-1]) + 1).scatter_reduce(0, place, flat.abs(), "amax").clamp(min=1e-6)
        state: dict[str, Any] = {
            "quant_type": "nf4", "blocksize": block, "dtype": str(weight.dtype)[6:], "shape": list(upright.shape),
        }  # fmt: skip
        stored: dict[str, Tensor] = {f"{name}.quant_map": TABLE.clone()}
        if nested:
            offset = float(largest.mean())
            outer = torch.arange(len(largest)) // nested
            scale = (
                torch.zeros(int(outer[-1]) + 1).scatter_reduce(0, outer, (largest - offset).abs(), "amax")
                + 1e-6
            )
            table = torch.linspace(-1, 1, 256)
            codes = (((largest - offset) / scale[outer])[:, None] - table).abs().argmin(1)
            largest = table[codes] * scale[outer] + offset
            stored |= {f"{name}.absmax": codes.to(torch.uint8), f"{name}.nested_absmax": scale}
            stored |= {f"{name}.nested_quant_map": table}
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        else:
            stored[f"{name}.absmax"] = largest
        codes = ((flat / largest[place])[:, None] - TABLE).abs().argmin(1)
        padded = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        stored[name] = (padded[0::2] << 4 | padded[1::2]).to(torch.uint8)[:, None]
        content = json.dumps(state).encode()
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(content), dtype=torch.uint8)
        value = (TABLE[codes] * largest[place]).view(upright.shape).to(weight.dtype)
        return stored, value.T if turned else value

    return pack


def eight(name: str, weight: Tensor) -> Packed:
    scale = weight.float().abs().amax(1)
    codes = (weight.float() / scale[:, None] * 127).round().to(torch.int8)
    layer = name.removesuffix(".weight")
    stored = {
        name: codes,
        f"{layer}.SCB": scale,
        f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, (codes.float() * scale[:, None] * (1 / 127)).to(weight.dtype)


def made(
    tmp_path: Path, pack: Callable[[str, Tensor], Packed], sizes: Any = SIZES, **how: Any
) -> tuple[Path, Path]:
    settings = how.pop("settings", SETTINGS)
    return two_folders(tiny_llama(**sizes), tmp_path, pack, settings, dtype=torch.bfloat16, **how)


@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("nested", [0, 16])
def test_four_bits(tmp_path: Path, sizes: Any, nested: int) -> None:
    coded, plain = made(tmp_path, packer(nested=nested), sizes, kept=("o_proj.weight",))
    assert check_read(coded, plain).decoded == "bitsandbytes nf4, 4 bits"


def test_four_bits_are_quantized_as_the_floats_are(tmp_path: Path) -> None:
    check_quantized(*made(tmp_path, packer(nested=16)), tmp_path)


@pytest.mark.parametrize("settings", [SETTINGS | {"load_in_4bit": False, "load_in_8bit": True}, None])
def test_eight_bits(tmp_path: Path, settings: Any) -> None:
    coded, plain = made(tmp_path, eight, settings=settings)
    assert check_read(coded, plain).decoded == "bitsandbytes int, 8 bits"
    check_quantized(coded, plain, tmp_path)


def test_layers_that_store_their_weight_as_in_by_out(tmp_path: Path) -> None:
    model = model_of("gpt2", n_embd=64, n_inner=96)
    coded, plain = two_folders(model, tmp_path, packer(turned=True), SETTINGS, dtype=torch.float16)
    check_read(coded, plain)


def test_the_library_decodes_the_same(tmp_path: Path) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="compared with bitsandbytes where it is installed"
    )
    coded, _ = made(tmp_path, packer(nested=16))
    tensors = load_file(coded / "model.safetensors")
    parts = {name[len(UP) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{UP}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(tensors[UP], state)
    assert torch.equal(theirs, read_tensor(open_float(coded).source, UP))


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path / "four", packer(nested=16))

    def refuses(says: str, folder: Path) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(folder)

    state = f"{UP}.quant_state.bitsandbytes__nf4"
    for name in (f"{UP}.absmax", f"{UP}.quant_map", f"{UP}.nested_absmax", f"{UP}.nested_quant_map"):
        kept: list[Tensor] = []
        change_tensors(coded, lambda tensors: kept.append(tensors.pop(name)))  # noqa: B023
        refuses(f"lacks {name}", coded)
        change_tensors(coded, lambda tensors: tensors.update({name: kept[0]}))  # noqa: B023
    change_tensors(
        coded, lambda tensors: tensors.update({f"{UP}.absmax": tensors[f"{UP}.absmax"][:-1].clone()})
    )
    refuses(rf"{UP} has 12288 bytes and \[383\] magnitudes, and 192 x 128 codes of 4 bits", coded)
    change_tensors(coded, lambda tensors: tensors.update({state: torch.tensor([123, 34], dtype=torch.uint8)}))
    refuses(f"{state} is not JSON", coded)
    change_tensors(coded, lambda tensors: tensors.pop(state))
    refuses(rf"holds {UP}[.\w]* in \w+, and what belongs to it is not there", coded)
    coded, _ = made(tmp_path / "eight", eight)
    layer = UP.removesuffix(".weight")
    change_tensors(coded, lambda tensors: tensors.update({f"{layer}.weight_format": torch.tensor(2)}))
    refuses(f"{UP} lies in tiles of a GPU", coded)
    change_tensors(coded, lambda tensors: tensors.update({f"{layer}.SCB": torch.ones(3)}))
    refuses(rf"{layer}\.SCB \[3\]", coded)
    change_tensors(coded, lambda tensors: tensors.pop(f"{layer}.SCB"))
    refuses(f"holds {UP} in I8, and what belongs to it is not there", coded)
