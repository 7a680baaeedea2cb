"""`compressed-tensors`: the format of llm-compressor, which vLLM serves. Integers by groups or rows, small floats.

    weight_packed int32 [out, ceil(in b / 32)]   weight_shape int64 [2]   weight_scale [out, groups]
    weight_zero_point int32 [ceil(out b / 32), groups]                    w = (code - zero) * scale

Codes of any width are one stream of bits in a row. Weights of 8 bits by rows whose inputs are rounded to 8 bits for every token
(W8A8) are stored as bytes: `weight` int8 [out, in]. Every scheme is a group of the config, with its layers by name.

    weight_packed uint8 [out, in / 2]   weight_scale E4M3 [out, in / 16], weight_global_scale fp32 [1]        NVFP4
    weight_packed uint8 [out, in / 2]   weight_scale uint8 [out, in / 32]                                     MXFP4
    weight E4M3 [out, in]               weight_scale uint8 [out, in / 32]                                     MXFP8
    weight E4M3 [out, in]               weight_scale floats [out, 1], [1] or [out / 128, in / 128]            FP8

Ref: compressed-tensors 0.18 and 0.19, compressors/pack_quantized, naive_quantized, nvfp4, mxfp4, mxfp8.
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
from fracbit.checkpoint.export.small_floats import (
    FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    EitherForms,
    FloatForms,
    exponents,
    float_codes,
    in_pairs,
    is_small_float,
    small_steps,
)
from fracbit.checkpoint.format import StoredLayer
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme, patch_block

VERSION = "0.18.0"
"""The version of compressed-tensors whose layout this is."""
BYTE = (8, "none", "row")
INTEGERS = IntegerForms(
    bits=tuple(range(1, 9)),
    offsets=("none", "zero"),
    blocks=("any", "row"),
    scales=("fp16", "bf16", "fp32"),
    inputs="int8/token",
)
HELD = EitherForms(INTEGERS, FloatForms((NVFP4, MXFP4, MXFP8, *FP8), inputs=FP8))


def _in_bytes(layer: StoredLayer) -> bool:
    scheme = layer.scheme
    return layer.inputs is not None and (scheme.bits, scheme.offset, scheme.block) == BYTE


def _tensors(layer: StoredLayer, packed: PackedTensor) -> dict[str, Tensor]:
    if is_small_float(packed.scheme):
        return _float_tensors(packed)
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


def _float_tensors(packed: PackedTensor) -> dict[str, Tensor]:
    codes, scheme = float_codes(packed), packed.scheme  # [out, in]
    if scheme == NVFP4:
        small, factor = small_steps(packed)  # [out, blocks], [1]
        return {".weight_packed": in_pairs(codes), ".weight_scale": small, ".weight_global_scale": 1 / factor}
    if scheme == MXFP4:
        return {".weight_packed": in_pairs(codes), ".weight_scale": exponents(packed)}
    scale = exponents(packed) if scheme == MXFP8 else steps(packed)  # [out, blocks]
    return {
        ".weight": codes.view(torch.float8_e4m3fn),
        ".weight_scale": scale.view(-1) if scheme.block == "tensor" else scale,
    }


def _format(layer: StoredLayer) -> str:
    """What the config calls the layout of a layer."""
    named = {NVFP4: "nvfp4-pack-quantized", MXFP4: "mxfp4-pack-quantized", MXFP8: "mxfp8-quantized"}
    if is_small_float(layer.scheme):
        return named.get(layer.scheme, "float-quantized")
    return "int-quantized" if _in_bytes(layer) else "pack-quantized"


def _config(stored: StoredModel, names: ReleasedNames) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for (scheme, _), layers in linears_by_scheme(names).items():
        one = names.layers[layers[0]]
        groups[f"group_{len(groups)}"] = {
            "targets": layers,
            "weights": _weights(scheme),
            "input_activations": None if one.inputs is None else _inputs(scheme, one.inputs),
            "output_activations": None,
            "format": _format(one),
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
    patch = patch_block(scheme.block)
    strategy = "block" if patch else {"row": "channel", "tensor": "tensor"}.get(str(scheme.block), "group")
    small = {"scale_dtype": "torch.float8_e4m3fn"} if scheme == NVFP4 else {"scale_dtype": "torch.uint8"}
    return {
        "num_bits": scheme.bits, "type": _type(scheme), "symmetric": scheme.offset == "none", "dynamic": False,
        "strategy": "tensor_group" if scheme == NVFP4 else strategy, "group_size": group, "actorder": None,
        "block_structure": None if patch is None else list(patch), "observer": "minmax", "observer_kwargs": {},
        **(small if scheme in (NVFP4, MXFP4, MXFP8) else {}),
    }  # fmt: skip


def _inputs(scheme: Scheme, inputs: Inputs) -> dict[str, Any]:
    """Inputs that are rounded to 8 bits for every token, or group of inputs of a token."""
    return {
        "num_bits": 8, "type": _type(scheme), "symmetric": True, "dynamic": True,
        "strategy": "group" if inputs.group else "token", "group_size": inputs.group or None,
        "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip


def _type(scheme: Scheme) -> str:
    return "float" if is_small_float(scheme) else "int"


def export_compressed_tensors(parameter: str = "") -> CodedWeights:
    """The format; it takes no parameter. Raises `RecipeError` for one."""
    without_parameter("compressed-tensors", parameter)
    return CodedWeights(HELD, _tensors, _config)
