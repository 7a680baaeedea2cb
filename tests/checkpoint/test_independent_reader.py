"""A second reader of the saved format, written from docs/format.md alone: numpy and json, nothing of fracbit's.

It is the proof that the page is enough. Whatever it needs and the page does not say is a gap in the page.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fracbit.checkpoint.format import quantization_config, stored_layer, tensor_names
from fracbit.checkpoint.load import load
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear
from fracbit.numerics import decode, quantize_tensor
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Array = np.ndarray[Any, Any]
NUMPY = {"U8": "<u1", "I32": "<i4", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}

# ---- the reader ----------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder's safetensors files; bf16 is widened to fp32."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = (start + position for position in entry["data_offsets"])
                found = np.frombuffer(raw[first:last], NUMPY[entry["dtype"]]).reshape(entry["shape"])
                wide = entry["dtype"] == "BF16"
                tensors[name] = (found.astype("<u4") << 16).view("<f4") if wide else found
    return tensors


def unpack(stored: Array, bits: int, count: int) -> Array:
    """Codes [rows, count] of little-endian bit streams [rows, bytes]."""
    stream = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits].reshape(
        len(stored), count, bits
    )
    return (stream * (1 << np.arange(bits))).sum(-1)


def block_of(scheme: dict[str, Any], out: int, kept: int) -> tuple[Array, tuple[int, ...]]:
    """The block number of every weight [out, kept], and the shape of the scales."""
    o, i = np.arange(out)[:, None], np.arange(kept)[None]
    block = scheme["block"]
    if block == "tensor":
        return 0 * (o + i), (1, 1)
    if isinstance(block, str) and block.startswith("flat:"):
        size = min(int(block[5:]), out * kept)
        return (o * kept + i) // size, (math.ceil(out * kept / size),)
    line = kept if scheme["axis"] == "in" else out
    size = line if block == "row" else min(block, line)
    number = math.ceil(line / size)
    return (
        (o * number + i // size, (out, number))
        if scheme["axis"] == "in"
        else (o // size * kept + i, (number, kept))
    )


def values(
    parts: dict[str, Array], stem: str, scheme: dict[str, Any], shape: tuple[int, int], tables: Any
) -> Array:
    """A packed tensor whose codes are `<stem>_codes` and whose other parts start with `<stem>_`, as fp32 [out, kept]."""
    out, kept = shape
    bits, f32 = scheme["bits"], np.float32
    block, stored = block_of(scheme, out, kept)

    def per_block(name: str) -> Array:
        if isinstance(scheme["scale"], str):
            assert parts[name].shape == stored
            found = parts[name].astype(f32).ravel()
            return np.exp2(found - 127) if scheme["scale"] == "e8m0" else found
        return values(parts, name, scheme["scale"], (1, math.prod(stored)), tables).ravel()

    full = "/full" if scheme["offset"] in ("zero", "float") else ""
    table = parts.get(f"{stem}_table")
    if table is None:
        table = np.array([tables[f"{scheme['dtype']}/{bits}{full}"]])
    table = np.broadcast_to(table.astype(f32), (out, table.shape[1]))
    codes = unpack(parts[f"{stem}_codes"].reshape(out, -1), bits, kept)
    scale = per_block(f"{stem}_scales")
    weight = scale[block] * np.take_along_axis(table, codes, 1)
    if scheme["offset"] == "zero":
        rows, columns = stored if len(stored) == 2 else (1, *stored)
        zero = unpack(parts[f"{stem}_offsets"].reshape(rows, -1), bits, columns).ravel()
        weight = weight - scale[block] * table[0][zero[block]]
    elif scheme["offset"] != "none":
        weight = weight + per_block(f"{stem}_offsets")[block]
    return weight.astype(f32)


def read_layer(config: dict[str, Any], tensors: dict[str, Array], name: str) -> Array:
    """The weight [out, in] of one layer."""
    entry = config["layers"][name]
    out, inputs = entry["shape"]
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.weight_")}
    parts[f"{name}.weight_codes"] = tensors[f"{name}.weight"]
    columns = parts.get(f"{name}.weight_columns", np.zeros(0, np.int32))
    kept = np.setdiff1d(np.arange(inputs), columns)
    weight = np.empty((out, inputs), np.float32)
    scheme = config["schemes"][entry["scheme"]]
    weight[:, kept] = values(parts, f"{name}.weight", scheme, (out, len(kept)), config["tables"])
    if len(columns):
        weight[:, columns] = parts[f"{name}.weight_outliers"]
    return weight


# ---- against fracbit -----------------------------------------------------------------------------------------------

SCHEMES = [
    Scheme("int", 3, 64),
    Scheme("int", 5, 16, "out", "zero"),
    Scheme("int", 3, "flat:50", offset="zero", scale="bf16"),
    Scheme("int", 1, 32, offset="float", scale="fp32"),
    Scheme("nf", 4, 64, scale="int8:256"),
    Scheme("nf", 3, 20, "out", "mean", scale="int6:16"),
    Scheme(
        "int", 4, 16, "in", "float", scale=Scheme("float:e4m3", 8, "flat:32", offset="none", scale="fp32")
    ),
    Scheme("int", 4, 16, offset="zero", scale=Scheme("int", 8, 7, offset="zero")),
    Scheme("int", 4, 16, scale=Scheme("kmeans", 5, 32)),
    Scheme("float:e3m0", 4, "tensor"),
    Scheme("float", 7, "row", "out", "mean"),
    Scheme("dynamic", 8, "flat:4096"),
    Scheme("power:1/2", 6, 10_000),
    Scheme("quantile", 3, 64, "out"),
    Scheme("kmeans:row", 2, 40, offset="float"),
    Scheme("kmeans", 4, "flat:33", offset="mean"),
    Scheme("int:step", 3, 16),
    Scheme("int:step", 4, 32, offset="float", scale="int:up6:8"),
    Scheme("int:step", 3, 16, scale="int:step6:16"),
    Scheme("iq", 4, 32),
    Scheme("ocp", 4, 16, scale="ocp8:tensor"),
    Scheme("ocp", 4, 32, scale="e8m0"),
    Scheme("ocp:e5m2", 8, "row"),
]


@pytest.mark.parametrize("columns", [0, 3], ids=["", "outliers"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_page_is_enough(scheme: Scheme, columns: int, tmp_path: Path) -> None:
    weight = torch.randn(37, 172, generator=torch.Generator().manual_seed(5)) * 0.1
    kept16 = torch.tensor([171, 4, 90])[:columns]
    packed = quantize_tensor(weight, scheme, columns=kept16)
    save_file(tensor_names("a.b", packed), tmp_path / "model.safetensors")
    config = json.loads(json.dumps(quantization_config({"a.b": stored_layer(packed)})))
    found = read_layer(config, read_tensors(tmp_path), "a.b")
    np.testing.assert_allclose(found, decode(packed).numpy(), rtol=1e-6, atol=1e-8)


def test_a_whole_checkpoint(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    tiny_llama(intermediate_size=172, tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    scheme, embeddings = Scheme("nf", 4, 64, scale="int8:256"), Scheme("int", 6, 16, offset="zero")
    recipe = Recipe(model=str(tmp_path / "float"), scheme=scheme, embeddings=embeddings)
    write_checkpoint(recipe, tmp_path / "q", shard_bytes=20_000)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    tensors, model = read_tensors(tmp_path / "q"), load(tmp_path / "q")
    assert len(config["layers"]) == 7 * 3 + 1
    for name in config["layers"]:
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear | QuantEmbedding)
        np.testing.assert_allclose(
            read_layer(config, tensors, name), decode(module.packed).numpy(), rtol=1e-6, atol=1e-8
        )
