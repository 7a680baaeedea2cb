"""`gptq`: the format of AutoGPTQ and GPTQModel, which vLLM and SGLang serve too. Integers of 2, 3, 4 or 8 bits by groups.

    qweight int32 [in b / 32, out]   qzeros int32 [groups, out b / 32]   scales [groups, out]   g_idx int32 [in]

    w[o, i] = (code[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

Version 2 stores zero points as they are; `gptq:v1` stores zero - 1, for programs of before 2025. Layers of other widths than
most are named in `dynamic`, which GPTQModel reads; vLLM does so for linears that it does not fuse.
"""

from __future__ import annotations

import re
from functools import partial
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
from fracbit.checkpoint.export.parameter import one_of
from fracbit.checkpoint.format import StoredLayer
from fracbit.models.find import family_of
from fracbit.models.skeleton import quantizable
from fracbit.numerics.packed import PackedTensor
from fracbit.records.grouped import some_of
from fracbit.records.scheme import Scheme

HELD = IntegerForms(
    bits=(2, 3, 4, 8),
    offsets=("none", "zero"),
    blocks=(16, 32, 64, 128, 256, 512, 1024, "row"),
    columns=32,
    rows=32,
)


def _tensors(layer: StoredLayer, packed: PackedTensor, *, version: int) -> dict[str, Tensor]:
    scheme = packed.scheme
    less = 1 if version == 1 else 0
    zeros = zero_codes(packed).T.contiguous() - less  # [groups, out]
    width = packed.shape[1]
    group = scheme.block if isinstance(scheme.block, int) else width
    return {
        ".qweight": row_words(packed).T,  # [in b / 32, out]
        ".qzeros": words_of(zeros, scheme.bits),  # [groups, out b / 32]
        ".scales": steps(packed).T,  # [groups, out]
        ".g_idx": torch.arange(width, dtype=torch.int32) // group,  # [in]
    }


def _fault(packed: PackedTensor) -> str:
    """Why version 1 cannot hold a layer."""
    if packed.scheme.offset == "zero" and bool((zero_codes(packed) == 0).any()):
        return (
            "a zero point is 0, which version 1 of GPTQ stores as -1, and its readers disagree about that; export gptq, its "
            "version 2"
        )
    return ""


def _notes(stored: StoredModel, names: ReleasedNames) -> tuple[str, ...]:
    """What vLLM does not see: widths of linears that it fuses, since `dynamic` names single linears."""
    by_scheme = linears_by_scheme(names)
    if len(by_scheme) < 2:
        return ()
    most = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    others = {name for scheme, layers in by_scheme.items() if scheme != most for name in layers}
    groups: dict[str, list[str]] = {}
    for name, layer in quantizable(stored.model, family_of(stored.model)).items():
        groups.setdefault(layer.group, []).append(names.module(name))
    unseen = [name for group in groups.values() if len(group) > 1 for name in group if name in others]
    if not unseen:
        return ()
    return (
        f"vLLM fuses linears that read one input, and takes these for {most[0]}, the scheme of most layers, since `dynamic` "
        f"names single linears: {some_of(unseen)}; for vLLM export compressed-tensors with one scheme for such linears "
        "(--for vllm-cpu chooses so); GPTQModel reads them as they are",
    )


def _config(stored: StoredModel, names: ReleasedNames, *, version: int) -> dict[str, Any]:
    by_scheme = linears_by_scheme(names)
    (most, _), _ = max(
        by_scheme.items(), key=lambda item: len(item[1]), default=((Scheme("int:step", 4, 128), ""), [])
    )
    dynamic: dict[str, Any] = {f"-:{_exactly(name)}": {} for name in names.floats if name != "lm_head"}
    for (scheme, _), layers in by_scheme.items():
        if scheme != most:
            dynamic |= {f"+:{_exactly(name)}": _how(scheme) for name in layers}
    quantization = {
        "quant_method": "gptq",
        **_how(most),
        "desc_act": False,
        "lm_head": "lm_head" in names.layers,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }
    return {**stored.source.config, "quantization_config": quantization}


def _how(scheme: Scheme) -> dict[str, Any]:
    group = scheme.block if isinstance(scheme.block, int) else -1
    return {"bits": scheme.bits, "group_size": group, "sym": scheme.offset == "none"}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def export_gptq(parameter: str = "") -> CodedWeights:
    """The format in version 2, or 1 for the parameter `v1`. Raises `RecipeError` for another parameter."""
    version = 1 if one_of("gptq", parameter, ("v1", "v2"), "version") == "v1" else 2
    return CodedWeights(
        HELD,
        partial(_tensors, version=version),
        partial(_config, version=version),
        fault=_fault if version == 1 else None,
        notes=_notes,
    )
