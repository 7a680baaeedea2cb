"""`awq`: the format of AutoAWQ in its layout GEMM, which vLLM serves. Integers of 4 bits with zero points, by groups.

    qweight int32 [in, out / 8]   qzeros int32 [groups, out / 8]   scales [groups, out]

    w[o, i] = (code[i, o] - zero[i // group_size, o]) * scale[i // group_size, o]

Eight outputs share a word, in the order of formats/awq.py. One size of groups for all layers.
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
    steps,
    words_of,
    zero_codes,
)
from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.export.parameter import without_parameter
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.awq import BITS, ORDER
from fracbit.errors import FormatError
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor

HELD = IntegerForms(bits=(BITS,), offsets=("none", "zero"), blocks=(32, 64, 128, 256, "row"), columns=8)


def _tensors(layer: StoredLayer, packed: PackedTensor) -> dict[str, Tensor]:
    return {
        ".qweight": _words(codes_in(packed).T),  # [in, out / 8]
        ".qzeros": _words(zero_codes(packed).T),  # [groups, out / 8]
        ".scales": steps(packed).T,  # [groups, out]
    }


def _words(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, n] as int32 [rows, n / 8], in the order of the format."""
    ordered = codes.reshape(len(codes), -1, len(ORDER))[..., torch.tensor(ORDER)]  # [rows, n / 8, 8]
    return words_of(ordered.flatten(1), BITS)


def _config(stored: StoredModel, names: ReleasedNames) -> dict[str, Any]:
    if "lm_head" in names.layers:
        raise FormatError(
            "format awq has no quantized output head; keep it float, or export compressed-tensors"
        )
    sizes = {scheme.block if isinstance(scheme.block, int) else -1 for scheme, _ in linears_by_scheme(names)}
    if len(sizes) > 1:
        raise FormatError(
            f"format awq has one size of groups for all layers, and there are {sorted(sizes)}; export gptq"
        )
    quantization = {
        "quant_method": "awq", "bits": BITS, "group_size": max(sizes, default=128), "zero_point": True, "version": "gemm",
        "modules_to_not_convert": list(names.floats),
    }  # fmt: skip
    return {**stored.source.config, "quantization_config": quantization}


def export_awq(parameter: str = "") -> CodedWeights:
    """The format; it takes no parameter. Raises `RecipeError` for one."""
    without_parameter("awq", parameter)
    return CodedWeights(HELD, _tensors, _config)
