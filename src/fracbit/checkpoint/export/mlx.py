"""`mlx`: the format of Apple's MLX and mlx-lm. Integers of 2, 3, 4, 5, 6 or 8 bits with the bottom of every group.

    weight uint32 [out, in b / 32]   scales [out, groups]   biases [out, groups]        w = code * scale + bias

Groups of 32, 64 or 128 along the input; embedding tables too. Every layer may have a width of its own. MXFP4 and MXFP8 have no
biases, and exponents uint8 as scales. NVFP4 has no scale for the whole tensor there, so ours is not held.

Ref: mlx 0.32, `mx.quantize` with modes affine, mxfp4, mxfp8; mlx-lm reads `quantization` in config.json, with an entry for
each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.export.coded import (
    CodedWeights,
    IntegerForms,
    ReleasedNames,
    as_words,
    experts_of,
    linears_by_scheme,
    row_words,
    steps,
)
from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.export.parameter import without_parameter
from fracbit.checkpoint.export.small_floats import (
    MXFP4,
    MXFP8,
    EitherForms,
    FloatForms,
    exponents,
    float_codes,
    in_pairs,
    is_small_float,
)
from fracbit.checkpoint.format import StoredLayer
from fracbit.models.blocks import is_transposed
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme

INTEGERS = IntegerForms(
    bits=(2, 3, 4, 5, 6, 8), offsets=("none", "float"), blocks=(32, 64, 128), embeddings=True
)
HELD = EitherForms(INTEGERS, FloatForms((MXFP4, MXFP8), embeddings=True))


def _tensors(layer: StoredLayer, packed: PackedTensor) -> dict[str, Tensor]:
    if is_small_float(packed.scheme):
        codes = float_codes(packed)  # [out, in]
        words = as_words(in_pairs(codes) if packed.scheme.bits == 4 else codes)  # [out, words]
        return {".weight": words.view(torch.uint32), ".scales": exponents(packed)}
    step = steps(packed)  # [out, groups]
    symmetric = packed.offsets is None
    bottom = step * -(2 ** (packed.scheme.bits - 1)) if symmetric else packed.offsets  # [out, groups]
    assert isinstance(bottom, Tensor)
    return {".weight": row_words(packed).view(torch.uint32), ".scales": step, ".biases": bottom}


def _refused(model: PreTrainedModel) -> str:
    """Models whose weights mlx-lm joins or turns while it loads them, but not their scales."""
    if experts_of(model) or any(is_transposed(module) for module in model.modules()):
        return (
            f"mlx-lm joins or turns weights of {type(model).__name__} while it loads them, and not their scales; write gguf or "
            "float"
        )
    return ""


def _config(stored: StoredModel, names: ReleasedNames) -> dict[str, Any]:
    by_scheme = linears_by_scheme(names)
    (most, _), _ = max(
        by_scheme.items(), key=lambda item: len(item[1]), default=((Scheme("int:step", 4, 64), ""), [])
    )
    quantization: dict[str, Any] = {**_how(most), **dict.fromkeys(names.floats, False)}
    for (scheme, _), layers in by_scheme.items():
        if scheme != most:
            quantization |= {name: _how(scheme) for name in layers}
    config = {name: value for name, value in stored.source.config.items() if name != "quantization_config"}
    return {**config, "quantization": quantization, "quantization_config": quantization}


def _how(scheme: Scheme) -> dict[str, Any]:
    mode = f"mxfp{scheme.bits}" if is_small_float(scheme) else "affine"
    return {"group_size": scheme.block, "bits": scheme.bits, "mode": mode}


def export_mlx(parameter: str = "") -> CodedWeights:
    """The format; it takes no parameter. Raises `RecipeError` for one."""
    without_parameter("mlx", parameter)
    return CodedWeights(HELD, _tensors, _config, _refused)
