"""GPTQ, versions 1 and 2: integers of 2, 3, 4 or 8 bits in words along the inputs, as AutoGPTQ and GPTQModel write them.

    qweight int32 [in b / 32, out]   qzeros int32 [groups, out b / 32]   scales [groups, out]   g_idx int32 [in]

    w[o, i] = (code[i, o] - zero[g, o]) * scale[g, o],   g = g_idx[i], or i // group_size without it

Version 1 stores zero - 1, and its readers add 1 within the bits of a code. Widths of layers (`dynamic`) show in the shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type, spelled, unpack_words, words_for
from fracbit.checkpoint.formats.decoding import INDICES, NUMBERS, WORDS, Decoding, Part
from fracbit.checkpoint.formats.integers import StoredIntegers
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.formats.marlin import MARLIN
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError
from fracbit.records.scheme import Offset

WIDTHS = (2, 3, 4, 8)
VERSIONS = {"": 1, "gptq": 1, "gptq_v2": 2}
"""By `checkpoint_format`; files of before it have version 1."""
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
WRITTEN = {"words": ".qweight", "scales": ".scales"}


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether words and scales lie side by side as in this format: as many words in a row as there are outputs."""
    return any(
        name.endswith(".qweight")
        and (scales := tensors.get(name.removesuffix("qweight") + "scales")) is not None
        and info.shape[1:] == scales.shape[1:]
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` for a version that is not known, and naming a tensor that does not fit."""
    if _layout(settings) == "marlin":
        return MARLIN.decode(source, settings)
    layers = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    if not layers:
        return Decoded("", {})
    version = _version(source, settings)
    found, widths = {}, set()
    for layer in layers:
        bits, found[f"{layer}.weight"] = _decoding(source, settings, layer, version)
        widths.add(bits)
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    left = [name for name in source.tensors if name.endswith((".qzeros", ".scales")) and name not in parts]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]} and no qweight beside it; fetch the checkpoint again"
        )
    unused = frozenset(name for name in source.tensors if name.endswith(PARTS) and name not in parts)
    title = f"GPTQ version {version}, {' and '.join(map(str, sorted(widths)))} bits"
    return Decoded(title, found, unused)


def _version(source: Source, settings: Mapping[str, Any]) -> int:
    """1 or 2. Raises `SourceError` where the config says nothing, or names another layout."""
    if not settings:
        raise SourceError(
            f"{source.name} holds codes of GPTQ, and neither its config.json nor a quantize_config.json says of which version, "
            "which decides its zero points; restore quantization_config in config.json"
        )
    named = _layout(settings)
    if named not in VERSIONS:
        raise SourceError(
            f"{source.name} is GPTQ in the layout {named}; fracbit decodes gptq, gptq_v2 and marlin: start from the float "
            "model, or save it again as one of these with GPTQModel"
        )
    return VERSIONS[named]


def _layout(settings: Mapping[str, Any]) -> str:
    """How a config says that the codes lie; "" where it does not."""
    named = str(settings.get("checkpoint_format") or "").lower()
    return "marlin" if settings.get("is_marlin_format") else named


def _decoding(source: Source, settings: Mapping[str, Any], layer: str, version: int) -> tuple[int, Decoding]:
    """The bits of a layer's codes and how its weight is made."""
    words, zeros, scales = (_info(source, layer + ending) for ending in PARTS[:3])
    order = source.tensors.get(f"{layer}.g_idx")
    groups, out = scales.shape if len(scales.shape) == 2 else (0, 0)
    bits = _bits(source, settings, layer, zeros=zeros, out=out)
    width = order.shape[0] if order is not None else words.shape[0] * 32 // bits
    if words.shape != (words_for(width, bits), out) or zeros.shape[:1] != (groups,):
        raise SourceError(
            f"{source.name}: layer {layer} has qweight {list(words.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)}, which do not fit {bits} bits and {width} inputs; compare config.json with the released one"
        )
    group = _group(source, settings, layer, groups=groups, width=width) if order is None else 0
    mask = 2**bits - 1

    def integers(parts: Mapping[str, Tensor]) -> StoredIntegers:
        codes = unpack_words(parts["words"].T, bits, width)  # [rows, in]
        zero = unpack_words(parts["zeros"], bits, codes.shape[0]).T  # [rows, groups]
        zero = zero if version == 2 else zero + 1 & mask
        index = parts["order"].long() if "order" in parts else torch.arange(width) // group  # [in]
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise SourceError(
                f"{source.name}: {layer}.g_idx names groups {int(index.min())} to {int(index.max())}, and there are {groups}; "
                "fetch the checkpoint again"
            )
        return StoredIntegers(
            bits, codes, parts["scales"].T, zero, groups=index, packer="gptq", written=WRITTEN
        )

    rows = 32 // math.gcd(32, bits)  # a stream of codes ends a word after so many
    parts = {
        "words": Part(f"{layer}.qweight", rows=1, axis=1, kinds=WORDS),
        "zeros": Part(f"{layer}.qzeros", rows=rows, units=rows * bits // 32, axis=1, kinds=WORDS),
        "scales": Part(f"{layer}.scales", rows=1, axis=1, kinds=NUMBERS),
    }
    parts |= {"order": Part(f"{layer}.g_idx", kinds=INDICES)} if order is not None else {}
    info = TensorInfo(words.file, decoded_type(source, scales), (out, width))
    even = width // groups  # of a width that groups divide, whatever their order
    offset: Offset = "none" if _symmetric(settings, layer) else "zero"
    scheme = spelled(bits, even, width, offset=offset, scale=scales)
    return bits, Decoding(info, parts, lambda some: integers(some).values, scheme=scheme, codes=integers)


def _symmetric(settings: Mapping[str, Any], layer: str) -> bool:
    """Whether all zero points of a layer are the middle code, as its config says."""
    for pattern, how in (settings.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), layer):
            return bool(how.get("sym", settings.get("sym", True)))
    return bool(settings.get("sym", True))


def _info(source: Source, name: str) -> TensorInfo:
    if name not in source.tensors:
        raise SourceError(
            f"{source.name} lacks {name}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )
    return source.tensors[name]


def _bits(source: Source, settings: Mapping[str, Any], layer: str, *, zeros: TensorInfo, out: int) -> int:
    """Bits of a layer's codes, from the words that hold its zero points; they are the config's unless it has `dynamic`."""
    fits = [bits for bits in WIDTHS if zeros.shape[1:] == (words_for(out, bits),)]
    asked = settings.get("bits")
    if asked in fits:
        return int(asked)
    dynamic = bool(settings.get("dynamic") or settings.get("extra_config"))
    if len(fits) != 1 or not (dynamic or asked is None):
        raise SourceError(
            f"{source.name}: {layer}.qzeros has shape {list(zeros.shape)}, which does not fit {asked} bits and {out} outputs; "
            f"fracbit decodes {', '.join(map(str, WIDTHS))} bits: compare config.json with the released one"
        )
    return fits[0]


def _group(source: Source, settings: Mapping[str, Any], layer: str, *, groups: int, width: int) -> int:
    """Inputs that share a scale, in a layer without g_idx. Raises `SourceError` where it would be needed, or does not fit."""
    if settings.get("desc_act"):
        raise SourceError(
            f"{source.name} lacks {layer}.g_idx, and its config says that inputs were sorted (desc_act): their groups cannot "
            "be known; fetch the checkpoint again"
        )
    asked = int(settings.get("group_size") or -1)
    group = asked if asked > 0 else width
    if groups != -(-width // group):
        raise SourceError(
            f"{source.name}: {layer}.scales has {groups} groups, and {width} inputs in groups of {group} make "
            f"{-(-width // group)}; compare group_size in config.json with the released one"
        )
    return group


GPTQ = SourceFormat(seen, decode)
