"""`compressed-tensors`: the format of llm-compressor, which vLLM serves. Integers of 1 to 8 bits by groups or rows.

    weight_packed int32 [out, ceil(in b / 32)]   weight_shape int64 [2]   weight_scale [out, groups]
    weight_zero_point int32 [ceil(out b / 32), groups]                    w = (code - zero) * scale

Codes of any width are one stream of bits in a row. Weights of 8 bits by rows whose inputs are rounded to 8 bits for every token
(W8A8) are stored as bytes: `weight` int8 [out, in]. Every scheme is a group of the config, with its layers by name.

Ref: compressed-tensors 0.18, compressors/pack_quantized and int_quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.export.coded import (
    CodedWeights,
    IntegerForms,
    ReleasedNames,
    linears_by_scheme,
    row_words,
    steps,
    words_of,
    zero_codes,
)
from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.export.parameter import without_parameter
from fracbit.checkpoint.format import StoredLayer
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme

VERSION = "0.18.0"
"""The version of compressed-tensors whose layout this is."""
BYTE = (8, "none", "row")
HELD = IntegerForms(
    bits=tuple(range(1, 9)),
    offsets=("none", "zero"),
    blocks=("any", "row"),
    scales=("fp16", "bf16", "fp32"),
    inputs="int8/token",
)


def _in_bytes(layer: StoredLayer) -> bool:
    scheme = layer.scheme
    return layer.inputs is not None and (scheme.bits, scheme.offset, scheme.block) == BYTE


def _tensors(layer: StoredLayer, packed: PackedTensor) -> dict[str, Tensor]:
    scale = {".weight_scale": steps(packed)}  # [out, groups]
    if _in_bytes(layer):
        return {".weight": (codes_in(packed).int() - 128).to(torch.int8), **scale}  # [out, in]
    found = {
        ".weight_packed": row_words(packed),  # [out, words]
        ".weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
        **scale,
    }
    if packed.scheme.offset == "zero":
        found[".weight_zero_point"] = words_of(zero_codes(packed).T, packed.scheme.bits).T  # [words, groups]
    return found


def _config(stored: StoredModel, names: ReleasedNames) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for (scheme, _), layers in linears_by_scheme(names).items():
        one = names.layers[layers[0]]
        groups[f"group_{len(groups)}"] = {
            "targets": layers,
            "weights": _weights(scheme),
            "input_activations": None if one.inputs is None else INPUTS,
            "output_activations": None,
            "format": "int-quantized" if _in_bytes(one) else "pack-quantized",
        }
    formats = {group["format"] for group in groups.values()}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(names.floats),
        "kv_cache_scheme": None,
        "version": VERSION,
    }
    return {**stored.source.config, "quantization_config": quantization}


def _weights(scheme: Scheme) -> dict[str, Any]:
    group = scheme.block if isinstance(scheme.block, int) else None
    return {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.offset == "none", "dynamic": False,
        "strategy": "channel" if group is None else "group", "group_size": group, "actorder": None, "block_structure": None,
        "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip


INPUTS = {
    "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "group_size": None,
    "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {},
}  # fmt: skip


def export_compressed_tensors(parameter: str = "") -> CodedWeights:
    """The format; it takes no parameter. Raises `RecipeError` for one."""
    without_parameter("compressed-tensors", parameter)
    return CodedWeights(HELD, _tensors, _config)
