"""AWQ in its layouts GEMM, GEMV and GEMV fast: integers of 4 bits, as AutoAWQ writes them; its Marlin is in marlin.py.

    gemm        qweight int32 [in, out / 8]   qzeros int32 [groups, out / 8]   scales [groups, out]
    gemv        qweight int32 [out, in / 8]   qzeros int32 [out, padded / 8]   scales [out, padded]
    gemv_fast   qweight int16 [out / 4, in]   qzeros float [padded, out]       scales [padded, out]

    w[o, i] = (code[o, i] - zero[g, o]) * scale[g, o],   g = i // group_size

gemv_fast stores - zero * scale, and in AWQ's first release calls it scaled_zeros. gemm puts eight outputs into a word, in the
order of `ORDER`; the others put inputs into words. `padded`: groups and some more that are not read. The scales that AWQ found
for the inputs are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type, spelled, unpack_words
from fracbit.checkpoint.formats.decoding import NUMBERS, Decoding, Part
from fracbit.checkpoint.formats.integers import StoredIntegers
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.formats.marlin import MARLIN
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that each half byte of a word holds, the lowest first."""
WORDS, ZEROS, SCALES = ".qweight", ".qzeros", ".scales"
SCALED_ZEROS = ".scaled_zeros"
WRITTEN = {"words": WORDS, "scales": SCALES}
_OUTPUTS, _INPUTS = 4, 64
"""Outputs and inputs that gemv_fast interleaves."""


@dataclass(frozen=True)
class AwqLayer:
    """A quantized layer: its name, its source, and the size of its groups, 0 for whole rows."""

    source: Source
    name: str
    asked: int

    def info(self, ending: str) -> TensorInfo:
        """The header of one of its tensors. Raises `SourceError` where the file lacks it."""
        if self.name + ending not in self.source.tensors:
            raise SourceError(
                f"{self.source.name} lacks {self.name}{ending}, without which the codes beside it mean nothing; fetch the "
                "checkpoint again"
            )
        return self.source.tensors[self.name + ending]

    def part(
        self, ending: str, rows: int, axis: int = 0, kinds: Sequence[str] = ("I32", "U32", "I16")
    ) -> Part:
        """One of its tensors as a part."""
        kinds = NUMBERS if ending == SCALES else kinds
        return Part(self.name + ending, rows=rows, axis=axis, kinds=tuple(kinds))

    def group(self, width: int) -> int:
        """Inputs that share a scale."""
        return self.asked or width

    def check(self, fits: bool, width: int, *endings: str) -> None:
        """Raise `SourceError` with the shapes of its tensors unless they fit."""
        if not fits:
            shapes = ", ".join(f"{ending[1:]} {list(self.info(ending).shape)}" for ending in endings)
            raise SourceError(
                f"{self.source.name}: layer {self.name} has {shapes}, and {width} inputs in groups of {self.group(width)} make "
                f"{-(-width // self.group(width))}; compare config.json with the released one"
            )


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether words and scales lie side by side as in this format: a word in a row for eight outputs."""
    return any(
        name.endswith(WORDS)
        and (scales := tensors.get(name.removesuffix(WORDS) + SCALES)) is not None
        and scales.shape[1:] == tuple(8 * size for size in info.shape[1:])
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` for another layout or width, and naming a tensor that does not fit."""
    names = [name.removesuffix(WORDS) for name in source.tensors if name.endswith(WORDS)]
    if not names:
        return Decoded("", {})
    layout = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if layout == "marlin":
        return MARLIN.decode(source, settings)
    if layout not in LAYOUTS or bits != BITS:
        raise SourceError(
            f"{source.name} is AWQ in the layout {layout} with {bits} bits; fracbit decodes {', '.join(LAYOUTS)} and marlin "
            f"with {BITS} bits: start from the float model"
        )
    asked = max(int(settings.get("group_size") or settings.get("q_group_size") or 0), 0)
    found = {f"{name}.weight": LAYOUTS[layout](AwqLayer(source, name, asked)) for name in names}
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    endings = (WORDS, ZEROS, SCALES, SCALED_ZEROS)
    left = [name for name in source.tensors if name.endswith(endings) and name not in parts]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]} and no qweight beside it; fetch the checkpoint again"
        )
    return Decoded(f"AWQ, {BITS} bits", found)


def _gemm(layer: AwqLayer) -> Decoding:
    words, zeros, scales = (layer.info(ending) for ending in (WORDS, ZEROS, SCALES))
    width, out = words.shape[0], 8 * words.shape[-1]
    group = layer.group(width)
    groups = -(-width // group)
    fits = scales.shape == (groups, out) and zeros.shape == (groups, out // 8)
    layer.check(fits, width, WORDS, ZEROS, SCALES)

    def integers(parts: Mapping[str, Tensor]) -> StoredIntegers:
        codes, zero = (
            _unpack(parts[name]).T.byte() for name in ("words", "zeros")
        )  # [rows, in], [rows, groups]
        index = torch.arange(width) // group  # [in]
        return StoredIntegers(
            BITS, codes, parts["scales"].T, zero, groups=index, packer="awq", written=WRITTEN
        )

    parts = {
        "words": layer.part(WORDS, rows=8, axis=1),
        "zeros": layer.part(ZEROS, rows=8, axis=1),
        "scales": layer.part(SCALES, rows=1, axis=1),
    }
    info = TensorInfo(words.file, decoded_type(layer.source, scales), (out, width))
    scheme = spelled(BITS, group, width, offset="zero", scale=scales)
    return Decoding(info, parts, lambda some: integers(some).values, scheme=scheme, codes=integers)


def _gemv(layer: AwqLayer) -> Decoding:
    words, zeros, scales = (layer.info(ending) for ending in (WORDS, ZEROS, SCALES))
    out, width = words.shape[0], 8 * words.shape[-1]
    group = layer.group(width)
    padded = 8 * zeros.shape[-1]
    fits = scales.shape == (out, padded) and zeros.shape == (out, padded // 8) and padded * group >= width
    layer.check(fits, width, WORDS, ZEROS, SCALES)

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        index = torch.arange(width) // group  # [in]
        codes, zero = (
            unpack_words(parts[name], BITS, count).int()
            for name, count in (("words", width), ("zeros", padded))
        )  # [rows, in], [rows, padded]
        return (codes - zero[:, index]) * parts["scales"].float()[:, index]  # [rows, in]

    parts = {name: layer.part(f".{ending}", rows=1) for name, ending in _GEMV.items()}
    info = TensorInfo(words.file, decoded_type(layer.source, scales), (out, width))
    return Decoding(info, parts, values, scheme=spelled(BITS, group, width, offset="zero", scale=scales))


def _gemv_fast(layer: AwqLayer) -> Decoding:
    second = SCALED_ZEROS if layer.name + SCALED_ZEROS in layer.source.tensors else ZEROS
    words, zeros, scales = (layer.info(ending) for ending in (WORDS, second, SCALES))
    out, width = _OUTPUTS * words.shape[0], words.shape[-1]
    group = layer.group(width)
    padded = scales.shape[0]
    fits = scales.shape == zeros.shape == (padded, out) and padded * group >= width and width % _INPUTS == 0
    layer.check(fits and words.dtype == "I16", width, WORDS, second, SCALES)

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        index = torch.arange(width) // group  # [in]
        scale, zero = (parts[name].float().T[:, index] for name in ("scales", "zeros"))  # [rows, in]
        return _unpack_fast(parts["words"]) * scale + zero

    parts = {
        "words": layer.part(WORDS, rows=_OUTPUTS),
        "zeros": layer.part(second, rows=1, axis=1, kinds=NUMBERS),
        "scales": layer.part(SCALES, rows=1, axis=1),
    }
    info = TensorInfo(words.file, decoded_type(layer.source, scales), (out, width))
    return Decoding(info, parts, values, scheme=spelled(BITS, group, width, offset="float", scale=scales))


def _unpack(words: Tensor) -> Tensor:
    """Codes int32 [rows, 8 n] of words int32 [rows, n], in the order of the outputs."""
    halves = words[..., None] >> torch.arange(0, 32, BITS, dtype=torch.int32) & 15  # [rows, n, 8]
    place = torch.tensor(ORDER).argsort()
    return halves[..., place].flatten(1)  # [rows, 8 n]


def _unpack_fast(words: Tensor) -> Tensor:
    """Codes int32 [4 n, in] of words int16 [n, in], which hold four outputs by 64 inputs, one output after another.

    32 inputs lie pair by pair: pairs 0, 4, 8, 12, then 1, 5, ...; within eight, the first of each pair before the second.
    """
    halves = words.int()[..., None] >> torch.arange(0, 16, BITS, dtype=torch.int32) & 15  # [n, in, 4]
    rows = halves.view(len(words), -1, _OUTPUTS, _INPUTS).transpose(1, 2)  # [n, 4, in / 64, 64]
    pairs = rows.reshape(
        *rows.shape[:3], 2, 4, 2, 4
    )  # [..., 32 inputs, eight, which of a pair, pair of the eight]
    return pairs.permute(0, 1, 2, 3, 6, 4, 5).reshape(len(words) * _OUTPUTS, -1)  # [4 n, in]


_GEMV = {"words": "qweight", "zeros": "qzeros", "scales": "scales"}
LAYOUTS: Mapping[str, Callable[[AwqLayer], Decoding]] = {
    "gemm": _gemm,
    "gemv": _gemv,
    "gemv_fast": _gemv_fast,
}
"""How the codes lie, by `version` in the config."""
AWQ = SourceFormat(seen, decode)
