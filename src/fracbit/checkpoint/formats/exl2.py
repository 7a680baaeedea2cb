"""EXL2, the format of exllamav2: groups of inputs with 2 to 8 bits each, sorted by how much they matter.

    q_weight int32 [words, out]     the codes, group by group; those of a group are one stream of bits along the inputs
    q_groups int16 [2 groups]       bits, and the first row of words, of each group
    q_scale int32 [groups, out / 8] codes of 4 bits       q_scale_max fp16 [groups]
    q_invperm int32 [in]            the place of every input among the sorted ones; or q_perm, its inverse

    w[o, i] = (code - 2^(bits - 1)) * ((q_scale + 1)^2 * (q_scale_max / 256)), each product rounded to fp16

Outputs are padded to a multiple of 32; a head has more rows than the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import unpack_words
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo, read_several
from fracbit.errors import SourceError

CODES, GROUPS, SCALE, LARGEST = ".q_weight", ".q_groups", ".q_scale", ".q_scale_max"
ORDERS = (".q_invperm", ".q_perm")
WIDTHS = (2, 3, 4, 5, 6, 8)
PADDED, HEAD = 32, "lm_head"
RowGroup = tuple[int, int, int]
"""Bits of a group, its first row of words and the row behind its last."""


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether codes and their groups are there."""
    return any(name.endswith(CODES) for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` naming a tensor that is missing or does not fit."""
    layers = [name.removesuffix(CODES) for name in source.tensors if name.endswith(CODES)]
    if not layers:
        return Decoded("", {})
    for layer in layers:
        _check_held(source, layer)
    groups = read_several(source, [layer + GROUPS for layer in layers])
    found: dict[str, Decoding] = {}
    widths: set[int] = set()
    unused: set[str] = set()
    for layer in layers:
        rows = _rows(source, layer, groups[layer + GROUPS])
        widths |= {bits for bits, _, _ in rows}
        found[f"{layer}.weight"] = _decoding(source, layer, rows)
        unused |= {name for each in (GROUPS, *ORDERS) if (name := layer + each) in source.tensors}
    title = f"EXL2, {min(widths)} to {max(widths)} bits"
    return Decoded(title, found, frozenset(unused))


def _check_held(source: Source, layer: str) -> None:
    missing = [layer + each for each in (GROUPS, SCALE, LARGEST) if layer + each not in source.tensors]
    if not any(layer + each in source.tensors for each in ORDERS):
        missing.append(layer + ORDERS[0])
    if missing:
        raise SourceError(
            f"{source.name} lacks {missing[0]}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )


def _rows(source: Source, layer: str, stored: Tensor) -> list[RowGroup]:
    """The groups of a layer in order. Raises `SourceError` where they are no groups of its words."""
    total = source.tensors[layer + CODES].shape[0]
    pairs = stored.view(-1, 2).tolist() if stored.numel() % 2 == 0 and stored.numel() else []
    starts = [start % (1 << 16) for _, start in pairs]  # unsigned, stored as int16
    ends = [*starts[1:], total][: len(starts)]
    found = [(bits, start, end) for (bits, _), start, end in zip(pairs, starts, ends, strict=True)]
    if not found or starts[0] or any(bits not in WIDTHS or start >= end for bits, start, end in found):
        raise SourceError(
            f"{source.name}: {layer}{GROUPS} does not divide the {total} rows of {layer}{CODES} into groups of "
            f"{', '.join(map(str, WIDTHS))} bits; fetch the checkpoint again"
        )
    return found


def _decoding(source: Source, layer: str, rows: list[RowGroup]) -> Decoding:
    words, scale, largest = (source.tensors[layer + each] for each in (CODES, SCALE, LARGEST))
    turned = layer + ORDERS[0] in source.tensors
    order = source.tensors[layer + ORDERS[0 if turned else 1]]
    width, padded = order.shape[0], words.shape[-1]
    counts = [(end - start) * 32 // bits for bits, start, end in rows]
    counts[-1] = width - sum(counts[:-1])  # the last one may end within a word
    enough = 0 < counts[-1] <= (rows[-1][2] - rows[-1][1]) * 32 // rows[-1][0]
    shapes = scale.shape == (len(rows), padded // 8) and largest.shape == (len(rows),)
    if not enough or not shapes or len(words.shape) != 2 or words.dtype != "I32":
        raise SourceError(
            f"{source.name}: layer {layer} has q_weight {list(words.shape)}, q_scale {list(scale.shape)}, q_scale_max "
            f"{list(largest.shape)} and {width} inputs, which do not fit its {len(rows)} groups; fetch the checkpoint again"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        sizes = unpack_words(parts["scale"], 4, parts["scale"].shape[1] * 8).float() + 1  # [groups, outputs]
        unit = (parts["largest"].float() / 256).half().float()  # [groups]
        scales = (sizes.square() * unit[:, None]).half().float()  # [groups, outputs]
        found = torch.empty(parts["words"].shape[1], width)  # [outputs, in], sorted
        first = 0
        for (bits, start, end), count, one in zip(rows, counts, scales, strict=True):
            codes = unpack_words(parts["words"][start:end].T, bits, count).float()  # [outputs, count]
            found[:, first : first + count] = (codes - 2 ** (bits - 1)) * one[: len(codes), None]
            first += count
        places = parts["order"].long() % (1 << 16)
        return found[:, places if turned else places.argsort()].half()

    parts = {
        "words": Part(layer + CODES, rows=1, axis=1),
        "scale": Part(layer + SCALE, rows=8, axis=1),
        "largest": Part(layer + LARGEST),
        "order": Part(layer + ORDERS[0 if turned else 1]),
    }
    bits = sum(bits * count for (bits, _, _), count in zip(rows, counts, strict=True)) / width
    info = TensorInfo(words.file, "F16", (_outputs(source, layer, padded), width))
    return Decoding(info, parts, values, scheme=f"exl2, {bits:.2f} bits")


def _outputs(source: Source, layer: str, padded: int) -> int:
    """Rows of a weight without those that fill up a multiple of `PADDED`: those of its bias, or of the vocabulary."""
    bias = source.tensors.get(f"{layer}.bias")
    sizes = [] if bias is None else [*bias.shape]
    if layer.endswith(HEAD):
        places = (source.config, source.config.get("text_config") or {})
        sizes += [int(place.get("vocab_size") or 0) for place in places]
    return next((size for size in sizes if padded - PADDED < size < padded), padded)


EXL2 = SourceFormat(seen, decode)
