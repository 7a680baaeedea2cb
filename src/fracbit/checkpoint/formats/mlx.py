"""MLX: integers of 2, 3, 4, 5, 6 or 8 bits by groups along the input, as mlx-lm writes them; embedding tables too.

    weight uint32 [out, in b / 32]   scales [out, groups]   biases [out, groups]        w = code * scale + bias
    weight uint32 [out, in b / 32]   scales uint8 [out, in / 32]                        w = float * 2^(scale - 127)

The second are the modes mxfp4 (E2M1) and mxfp8 (E4M3). The codes of a row are one stream of bits, the least significant first.
`quantization` in config.json has the width and the size of the groups, and an entry by name for every layer that has others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import (
    config_type,
    decoded_type,
    fp4_values,
    spelled,
    spread,
    unpack_words,
)
from fracbit.checkpoint.formats.decoding import NUMBERS, WORDS, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values
from fracbit.records.scheme import Scheme

WEIGHT, SCALES, BIASES = ".weight", ".scales", ".biases"
WIDTHS = (2, 3, 4, 5, 6, 8)
SMALL, GROUP = {"mxfp4": 4, "mxfp8": 8}, 32
"""Bits of the modes of small floats, and weights of a group of theirs."""


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether words, scales and biases lie side by side as in this format."""
    return any(_is_coded(name, info, tensors) for name, info in tensors.items())


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` for another mode, and naming a tensor for what does not fit."""
    layers = [
        name.removesuffix(WEIGHT)
        for name, info in source.tensors.items()
        if _is_coded(name, info, source.tensors)
    ]
    left = [
        name
        for name, info in source.tensors.items()
        if info.dtype == "U32" and name.endswith(WEIGHT) and name.removesuffix(WEIGHT) not in layers
    ]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]} in words of 32 bits and no scales beside it; fetch the checkpoint again"
        )
    found, widths = {}, set()
    for layer in layers:
        how = settings.get(layer) or settings
        small = str(how.get("mode")) in SMALL
        bits, found[f"{layer}.weight"] = (_small if small else _decoding)(source, layer, how)
        widths.add(bits)
    return Decoded(f"MLX, {' and '.join(map(str, sorted(widths)))} bits", found)


def _is_coded(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    layer = name.removesuffix(WEIGHT)
    return info.dtype == "U32" and name != layer and layer + SCALES in tensors


def _small(source: Source, layer: str, how: Mapping[str, Any]) -> tuple[int, Decoding]:
    """A layer of the modes mxfp4 and mxfp8: the bits of its codes and how its weight is made."""
    bits, words = SMALL[how["mode"]], source.tensors[layer + WEIGHT]
    scales, wide = source.tensors[layer + SCALES], words.shape[-1] * 32 // bits
    fits = len(words.shape) == 2 and scales.dtype == "U8" and scales.shape == (words.shape[0], wide // GROUP)
    if not fits or wide % GROUP:
        raise SourceError(
            f"{source.name}: layer {layer} has words {list(words.shape)} and scales {scales.dtype} {list(scales.shape)}, which "
            f"do not fit mode {how['mode']} with groups of {GROUP}; compare config.json with the released one"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["words"].view(torch.uint8)  # [rows, in b / 8]
        found = fp4_values(codes) if bits == 4 else codes.view(torch.float8_e4m3fn).float()  # [rows, in]
        return found * spread(scale_values(parts["scales"]), found.shape, (1, GROUP))  # [rows, in]

    parts = {"words": Part(layer + WEIGHT, rows=1), "scales": Part(layer + SCALES, rows=1)}
    info = TensorInfo(words.file, config_type(source.config), (words.shape[0], wide))
    return bits, Decoding(info, parts, values, scheme=str(Scheme("ocp", bits, GROUP, scale="e8m0")))


def _decoding(source: Source, layer: str, how: Mapping[str, Any]) -> tuple[int, Decoding]:
    """The bits of a layer's codes and how its weight is made."""
    if layer + BIASES not in source.tensors:
        raise SourceError(
            f"{source.name} holds {layer}{SCALES} and no {layer}{BIASES}: MLX's mode {how.get('mode', 'affine')} is not "
            f"decoded without them; fracbit decodes affine, {', '.join(SMALL)}"
        )
    words, scales, biases = (source.tensors[layer + ending] for ending in (WEIGHT, SCALES, BIASES))
    bits, group, mode = how.get("bits"), how.get("group_size"), how.get("mode", "affine")
    if len(words.shape) != 2:
        raise SourceError(
            f"{source.name}: {layer} is a stack of {words.shape[0]} experts, as mlx-lm joins them, and fracbit reads them one "
            "by one; start from the float model"
        )
    if mode != "affine" or bits not in WIDTHS or not isinstance(group, int) or group < 1:
        raise SourceError(
            f"{source.name}: layer {layer} has mode {mode}, {bits} bits and groups of {group}; fracbit decodes mode affine "
            f"with {', '.join(map(str, WIDTHS))} bits: compare `quantization` in config.json with the released one"
        )
    out, width = words.shape[0], words.shape[1] * 32 // bits
    if scales.shape != (out, width // group) or biases.shape != scales.shape or width % group:
        raise SourceError(
            f"{source.name}: layer {layer} has words {list(words.shape)}, scales {list(scales.shape)} and biases "
            f"{list(biases.shape)}, which do not fit {bits} bits in groups of {group}; compare config.json with the released "
            "one"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_words(parts["words"].view(torch.int32), bits, width).float()  # [rows, in]
        scale, bias = (spread(parts[name].float(), codes.shape, (1, group)) for name in ("scales", "biases"))
        return codes * scale + bias  # [rows, in]

    parts = {
        name: Part(layer + ending, rows=1, kinds=kinds)
        for name, ending, kinds in (
            ("words", WEIGHT, WORDS),
            ("scales", SCALES, NUMBERS),
            ("biases", BIASES, NUMBERS),
        )
    }
    scheme = spelled(bits, group, width, offset="float", scale=scales)
    info = TensorInfo(words.file, decoded_type(source, scales), (out, width))
    return bits, Decoding(info, parts, values, scheme=scheme)


MLX_FORMAT = SourceFormat(seen, decode)
