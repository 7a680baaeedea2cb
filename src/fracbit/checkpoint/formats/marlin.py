"""Marlin, the layout of a GPU kernel in which AutoGPTQ, AutoAWQ and vLLM's tools store symmetric integers of 4 bits.

    B (AWQ: qweight) int32 [in / 16, 2 out]   s (AWQ: scales) [groups, out]            w = (code - 8) * scale

Codes lie as the threads of a tensor core load them: 16 inputs and 64 outputs, in 4 tiles of 16 outputs, fill 128 words. Word
4 t + j is what thread t holds of tile j. Scales of the same 64 outputs (of 32 where a row has one scale) are permuted too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type, spelled
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError

BITS, TILE, OUTPUTS = 4, 16, 64
NAMES = ((".B", ".s"), (".qweight", ".scales"))
"""Endings of codes and of scales: AutoGPTQ's and AutoAWQ's."""
WORKSPACE = ".workspace"
_HALVES = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # the code, of a thread's eight, in each half byte of its word, the lowest first
_PAIRS = (0, 1, 8, 9, 16, 17, 24, 25)  # outputs of one thread, where rows have one scale


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether codes and scales lie side by side under the names that nothing else uses."""
    return any(name.endswith(".B") and f"{name[:-2]}.s" in tensors for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` naming a tensor that is missing or does not fit."""
    codes, scales = NAMES[0] if seen(source.tensors) else NAMES[1]
    layers = [name.removesuffix(codes) for name in source.tensors if name.endswith(codes)]
    if not layers:
        return Decoded("", {})
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if bits != BITS or settings.get("desc_act"):
        raise SourceError(
            f"{source.name} is in Marlin's layout with {bits} bits{' and sorted inputs' * bool(settings.get('desc_act'))}; "
            f"fracbit decodes its {BITS} bits in the order of the inputs: start from the float model"
        )
    found = {f"{layer}.weight": _decoding(source, layer + codes, layer + scales) for layer in layers}
    unused = frozenset(name for name in source.tensors if name.endswith(WORKSPACE))
    return Decoded(f"Marlin, {BITS} bits", found, unused)


def _decoding(source: Source, codes: str, scales: str) -> Decoding:
    if scales not in source.tensors:
        raise SourceError(
            f"{source.name} lacks {scales}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )
    words, scale = source.tensors[codes], source.tensors[scales]
    tiles, columns = words.shape if len(words.shape) == 2 else (0, 0)
    width, out = TILE * tiles, columns * 8 // TILE
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if not groups or scale.shape != (groups, out) or width % groups or out % OUTPUTS or words.dtype != "I32":
        raise SourceError(
            f"{source.name}: {codes} is {words.dtype} {list(words.shape)} and {scales} {list(scale.shape)}; Marlin's are I32 "
            f"[in / {TILE}, 2 out] and [groups, out], with outputs in {OUTPUTS}s: fetch the checkpoint again"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        found = unpacked(parts["words"])  # [in, outputs]
        grid = straight(parts["scale"].float())  # [groups, outputs]
        return ((found - 8).float() * grid.repeat_interleave(width // groups, 0)).T  # [outputs, in]

    parts = {
        "words": Part(codes, rows=OUTPUTS, units=TILE * OUTPUTS // 8, axis=1),
        "scale": Part(scales, rows=OUTPUTS, units=OUTPUTS, axis=1),
    }
    scheme = spelled(BITS, width // groups, width, offset="none", scale=scale)
    return Decoding(
        TensorInfo(words.file, decoded_type(source, scale), (out, width)), parts, values, scheme=scheme
    )


def places() -> Tensor:
    """int64 [1024]: for each code in order of words and half bytes, 256 tile + 16 input + output within the tile."""
    thread, tile, code = (torch.arange(size) for size in (32, 4, 8))
    code = code[list(_HALVES)]
    inputs = 2 * (thread[:, None] % 4) + code % 2 + 8 * (code // 2 % 2)  # [32, 8]
    outputs = thread[:, None] // 4 + 8 * (code // 4)  # [32, 8]
    return (256 * tile[:, None] + (TILE * inputs + outputs)[:, None]).flatten()


def unpacked(words: Tensor) -> Tensor:
    """Codes int32 [in, out] of words int32 [in / 16, 2 out]."""
    halves = (words[..., None] >> torch.arange(0, 32, BITS, dtype=torch.int32) & 15).view(
        len(words), -1, TILE * OUTPUTS
    )
    inner = (OUTPUTS // TILE, TILE, TILE)
    tiles = halves[..., places().argsort()].view(*halves.shape[:2], *inner)  # [n, m, 4, 16, 16]
    codes: Tensor = tiles.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    return codes  # [n 16, m 64]


def straight(scale: Tensor) -> Tensor:
    """Scales [groups, out] in the order of the outputs."""
    size, order = 64, torch.arange(64).view(8, 8).T.flatten()
    if len(scale) == 1:
        size, order = 32, (2 * torch.arange(4)[:, None] + torch.tensor(_PAIRS)).flatten()
    blocks = scale.view(len(scale), -1, size)
    return blocks[..., order.argsort()].flatten(1)


MARLIN = SourceFormat(seen, decode)
