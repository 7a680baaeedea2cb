"""EXL2, decoded while it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.summary import summarize
from fracbit.errors import SourceError
from rounded import SIZES, Packed, change_tensors, check_quantized, check_read, stream_of, two_folders

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
GROUPS = ((8, 32), (6, 32), (5, 32), (4, 32), (3, 32), (2, 32))
"""Bits and inputs of each group, the widest first; the last one ends with the row."""


def pack(name: str, weight: Tensor, turned: bool = True) -> Packed:
    """Inputs in a random order, groups with two scales each, outputs up to a multiple of 32."""
    layer, (out, width) = name.removesuffix(".weight"), weight.shape
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    padded = -(-out // 32) * 32
    rows = torch.cat([weight.float()[:, order], torch.zeros(padded - out, width)])  # [padded, in]
    sizes = [
        (bits, min(size, width - 32 * place))
        for place, (bits, size) in enumerate(GROUPS)
        if width > 32 * place
    ]
    sizes[-1] = (sizes[-1][0], width - sum(size for _, size in sizes[:-1]))
    words, groups, scales, largest, value, start = [], [], [], [], [], 0
    for (bits, _), part in zip(sizes, rows.split([size for _, size in sizes], 1), strict=True):
        base = part.abs().amax(1) / 2 ** (bits - 1) + 1e-6
        top = base.max().half()
        code = ((base / top.float()).sqrt() * 16).round().clamp(1, 16)  # [padded]
        scale = (code.square() * (top / 256).float()).half()
        codes = (part / scale.float()[:, None]).round().clamp(
            -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        ) + 0.0  # no -0
        value.append((codes * scale.float()[:, None]).half())
        groups += [bits, start]
        words.append(stream_of(codes + 2 ** (bits - 1), bits).T)
        start += len(words[-1])
        scales.append(code - 1)
        largest.append(top)
    place = order.argsort()
    stored = {
        "q_weight": torch.cat(words), "q_groups": torch.tensor(groups, dtype=torch.int16),
        "q_scale": stream_of(torch.stack(scales), 4), "q_scale_max": torch.stack(largest),
        "q_invperm" if turned else "q_perm": (place if turned else order).to(torch.int32),
    }  # fmt: skip
    return {f"{layer}.{part}": tensor for part, tensor in stored.items()}, torch.cat(value, 1)[:out][:, place]


def made(tmp_path: Path, how: Any = pack, **sizes: Any) -> tuple[Path, Path]:
    """With a head that is padded, in a file of exllamav2's name beside the index of the float model."""
    model = tiny_llama(**SIZES | {"num_hidden_layers": 1, "vocab_size": 99} | sizes)

    def which(name: str, tensor: Tensor) -> bool:
        return tensor.dim() == 2 and "embed" not in name

    coded, plain = two_folders(model, tmp_path, how, SETTINGS, dtype=torch.float16, which=which)
    return coded, plain


def test_groups_of_every_width_and_a_padded_head(tmp_path: Path) -> None:
    coded, plain = made(tmp_path)
    assert check_read(coded, plain).decoded == "EXL2, 2 to 8 bits"
    assert summarize(str(coded))["layers"][UP]["scheme"] == "exl2, 5.75 bits"


def test_the_older_order_and_exllamas_names_of_files(tmp_path: Path) -> None:
    coded, plain = made(tmp_path, lambda name, weight: pack(name, weight, turned=False))
    (coded / "model.safetensors").rename(coded / "output.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    check_read(coded, plain)
    check_quantized(coded, plain, tmp_path)


def test_what_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    coded, _ = made(tmp_path)

    def changed(says: str, **tensors: Tensor | None) -> None:
        kept: dict[str, Tensor] = {}

        def change(stored: dict[str, Tensor]) -> None:
            kept.update({name: stored.pop(f"{UP}.{name}") for name in tensors})
            stored.update({f"{UP}.{name}": tensor for name, tensor in tensors.items() if tensor is not None})

        change_tensors(coded, change)
        with pytest.raises(SourceError, match=says):
            open_float(coded)
        change_tensors(
            coded, lambda stored: stored.update({f"{UP}.{name}": each for name, each in kept.items()})
        )

    for part in ("q_groups", "q_scale", "q_scale_max", "q_invperm"):
        changed(rf"lacks {UP}\.{part}, without which", **{part: None})
    changed("does not divide the 23 rows", q_groups=torch.tensor([8, 0, 7, 8], dtype=torch.int16))
    changed("does not divide", q_groups=torch.tensor([8, 0, 4], dtype=torch.int16))
    changed("do not fit its 4 groups", q_scale_max=torch.ones(3, dtype=torch.float16))
    changed("96 inputs, which do not fit", q_invperm=torch.arange(96, dtype=torch.int32))
