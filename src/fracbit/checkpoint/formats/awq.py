"""AWQ in its layout GEMM: integers of 4 bits in words along the outputs, as AutoAWQ writes them.

    qweight int32 [in, out / 8]   qzeros int32 [groups, out / 8]   scales [groups, out]

    w[o, i] = (code[i, o] - zero[i // group_size, o]) * scale[i // group_size, o]

Eight outputs share a word, in the order of `ORDER`. The scales that AWQ found for the inputs are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type, spelled
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.integers import StoredIntegers
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that each half byte of a word holds, the lowest first."""
PARTS = (".qweight", ".qzeros", ".scales")
WRITTEN = {"words": ".qweight", "scales": ".scales"}


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether words and scales lie side by side as in this format: a word in a row for eight outputs."""
    return any(
        name.endswith(".qweight")
        and (scales := tensors.get(name.removesuffix("qweight") + "scales")) is not None
        and scales.shape[1:] == tuple(8 * size for size in info.shape[1:])
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` for another layout or width, and naming a tensor that does not fit."""
    layers = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    if not layers:
        return Decoded("", {})
    layout = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if layout != "gemm" or bits != BITS:
        raise SourceError(
            f"{source.name} is AWQ in the layout {layout} with {bits} bits; fracbit decodes gemm with {BITS} bits: start from "
            "the float model"
        )
    found = {f"{layer}.weight": _decoding(source, settings, layer) for layer in layers}
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    left = [name for name in source.tensors if name.endswith(PARTS) and name not in parts]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]} and no qweight beside it; fetch the checkpoint again"
        )
    return Decoded(f"AWQ, {BITS} bits", found)


def _decoding(source: Source, settings: Mapping[str, Any], layer: str) -> Decoding:
    missing = [layer + ending for ending in PARTS if layer + ending not in source.tensors]
    if missing:
        raise SourceError(
            f"{source.name} lacks {missing[0]}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )
    words, zeros, scales = (source.tensors[layer + ending] for ending in PARTS)
    width, out = words.shape[0], 8 * words.shape[-1]
    asked = int(settings.get("group_size") or settings.get("q_group_size") or -1)
    group = asked if asked > 0 else width
    groups = -(-width // group)
    if scales.shape != (groups, out) or zeros.shape != (groups, out // 8):
        raise SourceError(
            f"{source.name}: layer {layer} has qweight {list(words.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)}, and {width} inputs in groups of {group} make {groups}; compare config.json with "
            "the released one"
        )

    def integers(parts: Mapping[str, Tensor]) -> StoredIntegers:
        codes, zero = (
            _unpack(parts[name]).T.byte() for name in ("words", "zeros")
        )  # [rows, in], [rows, groups]
        index = torch.arange(width) // group  # [in]
        return StoredIntegers(
            BITS, codes, parts["scales"].T, zero, groups=index, packer="awq", written=WRITTEN
        )

    parts = {
        "words": Part(f"{layer}.qweight", rows=8, axis=1),
        "zeros": Part(f"{layer}.qzeros", rows=8, axis=1),
        "scales": Part(f"{layer}.scales", rows=1, axis=1),
    }
    scheme = spelled(BITS, group, width, offset="zero", scale=scales)
    info = TensorInfo(words.file, decoded_type(source, scales), (out, width))
    return Decoding(info, parts, lambda some: integers(some).values, scheme=scheme, integers=integers)


def _unpack(words: Tensor) -> Tensor:
    """Codes int32 [rows, 8 n] of words int32 [rows, n], in the order of the outputs."""
    halves = words[..., None] >> torch.arange(0, 32, BITS, dtype=torch.int32) & 15  # [rows, n, 8]
    place = torch.tensor(ORDER).argsort()
    return halves[..., place].flatten(1)  # [rows, 8 n]


AWQ = SourceFormat(seen, decode)
