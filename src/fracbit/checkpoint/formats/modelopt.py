"""NVIDIA's ModelOpt, and the layouts that AMD's Quark shares with it: small floats and integers of 4 and 8 bits.

    weight F8_E4M3 [.., out, in], weight_scale: one, by row, by block                       w = code * scale
    weight F8_E4M3 [.., out, in], weight_scale U8 [.., out, in / 32]          (MXFP8)       w = code * 2^(scale - 127)
    weight U8 [.., out, in / 2] (E2M1), weight_scale F8_E4M3 [.., out, in / 16],
    weight_scale_2                                                            (NVFP4)       w = code * (scale * scale_2)
    weight U8 [.., out, in / 2] (E2M1), weight_scale U8 [.., out, in / 32]    (MXFP4)       w = code * 2^(scale - 127)
    weight U8 [out / 2, in] (two outputs a byte), weight_scale [out, groups]  (AWQ)         w = code * scale
    weight I8 [out, in], weight_scale [out]                                                 w = code * scale

`pre_quant_scale` [in] multiplies the inputs, so it is multiplied into the weights; svdquant_lora_b @ svdquant_lora_a is added
before. A stack of experts has its own name before each part (`gate_up_proj_weight_scale`); stacks [experts, in, out] have their
codes along the inputs all the same. The tensors say which of these a layer has: hf_quant_config.json only names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import block_of, decoded_type, fp4_values, spelled, spread
from fracbit.checkpoint.formats.decoding import Decode, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values

BYTES = ("F8_E4M3", "F8_E5M2", "I8")
"""Types of codes that fill a byte each."""
POWERS = ("U8", "F8_E8M0")
"""Types of scales that are powers of 2."""
BLOCK = (128, 128)
ENDINGS = ("weight_scale", "weight_scale_2", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
RUN_TIME = (
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "k_bias",
    "v_bias",
    "q_scale",
    "prob_output_scale",
)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in codes, by its name in a source."""

    source: Source
    name: str

    @property
    def info(self) -> TensorInfo:
        """Its header."""
        return self.source.tensors[self.name]

    def beside(self, ending: str) -> str:
        """The name of a part of it."""
        stem = self.name.removesuffix("weight")
        return f"{stem}{ending}" if stem != self.name else f"{self.name}_{ending}"

    def part(self, ending: str) -> TensorInfo | None:
        """The header of a part, None where it has none."""
        return self.source.tensors.get(self.beside(ending))

    def broken(self, what: str) -> SourceError:
        """An error about it."""
        return SourceError(f"{self.source.name}: {self.name} {what}")


@dataclass(frozen=True, eq=False)
class CodeReading:
    """How the codes of a weight are read: a word for them, the shape that they make, their parts, and the values."""

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    values: Decode
    scheme: str


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether E2M1 codes have scales of both sizes beside them; single scales are also those of other formats."""
    return any(name.endswith("weight_scale_2") for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized weight. Raises `SourceError` naming a tensor that is missing or does not fit."""
    coded = [
        name for name, info in source.tensors.items() if info.dtype in (*BYTES, "U8") and not _is_part(name)
    ]
    if not coded:
        return Decoded("", {})
    found: dict[str, Decoding] = {}
    kinds: set[str] = set()
    for name in coded:
        weight = ScaledWeight(source, name)
        reading = _reading(weight)
        kinds.add(reading.kind)
        found[name] = _decoding(weight, reading)
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    left = [name for name in source.tensors if name.endswith(ENDINGS) and name not in parts]
    extra = {
        name for name in left if name.endswith("weight_scale_2")
    }  # of the second rounding of W4A8, at run time
    if set(left) - extra:
        raise SourceError(
            f"{source.name} holds {min(set(left) - extra)} and no codes that belong to it; fetch the checkpoint again"
        )
    unused = frozenset(name for name in source.tensors if name.endswith(RUN_TIME)) | extra
    return Decoded(f"ModelOpt {', '.join(sorted(kinds))}", found, unused, _notes(unused))


def _is_part(name: str) -> bool:
    return name.endswith((*ENDINGS, *RUN_TIME))


def _notes(unused: frozenset[str]) -> tuple[str, ...]:
    if not any(name.endswith("input_scale") for name in unused):
        return ()
    return (
        "the source rounds the activations of its layers while it runs; the decoded weights are used without that",
    )


def _reading(weight: ScaledWeight) -> CodeReading:
    """How a weight is stored, by its tensors."""
    scale = weight.part("weight_scale")
    if scale is None:
        raise weight.broken(
            f"is {weight.info.dtype}, and there is no {weight.beside('weight_scale')}: without its scale it is another tensor; "
            "fetch the checkpoint again"
        )
    if weight.info.dtype in BYTES:
        return _by_byte(weight, scale)
    if scale.dtype in POWERS or scale.dtype.startswith("F8"):
        return _fp4(weight, scale)
    return _awq(weight, scale)


def _by_byte(weight: ScaledWeight, scale: TensorInfo) -> CodeReading:
    """Floats or integers of 8 bits."""
    shape, grid = weight.info.shape, scale.shape
    if len(grid) == 4 and len(shape) == 2:
        grid = tuple(size for axis, size in enumerate(grid) if axis in (0, 2))  # [out / 128, 1, in / 128, 1]
    turned = (
        len(shape) == 3 and grid == (shape[0], shape[2]) != shape[:2]
    )  # by column of a stack [experts, in, out]
    small = scale.dtype in POWERS
    block = (shape[-2], 1) if turned else block_of(shape, grid, (1, 32) if small else None, BLOCK)
    if block is None or len(shape) < 2 or (len(shape) == 3 and len(grid) == 2 and shape[1] == shape[2]):
        raise weight.broken(
            f"is {list(shape)} and {weight.beside('weight_scale')} {list(scale.shape)}, which is no grid of scales for it; "
            "fetch the checkpoint again"
        )
    lengths = len(shape) == 2 and prod(grid) > 1
    parts = {
        "codes": Part(weight.name, rows=1),
        "scale": Part(weight.beside("weight_scale"), rows=block[0] if lengths else int(prod(grid) > 1)),
    }

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        codes, found = tensors["codes"].float(), scale_values(tensors["scale"])
        if found.dim() == 4 and codes.dim() == 2:
            found = found.flatten(0, 1).flatten(1)
        return codes * (found[:, None] if turned else spread(found, codes.shape, block))

    kind = "MXFP8" if small else "INT8" if weight.info.dtype == "I8" else "FP8"
    return CodeReading(kind, shape, parts, values, scheme=f"{kind.lower()}, {block[0]} x {block[1]}")


def _fp4(weight: ScaledWeight, scale: TensorInfo) -> CodeReading:
    """E2M1, with powers of 2, or with scales in fp8 and one for the whole matrix or each expert."""
    shape, powers = weight.info.shape, scale.dtype in POWERS
    size = 32 if powers else 16
    turned = len(shape) == 3 and scale.shape == (shape[0], 2 * shape[1] // size, shape[2]) != _grid(
        shape, size
    )
    double = weight.part("weight_scale_2")
    fits = turned or scale.shape == _grid(shape, size)
    if not fits or (double is None and not powers):
        second = "" if double is not None or powers else f" and no {weight.beside('weight_scale_2')}"
        raise weight.broken(
            f"is U8 {list(shape)} with scales {scale.dtype} {list(scale.shape)}{second}; floats of 4 bits have one for {size} "
            "weights: fetch the checkpoint again"
        )
    parts = {"codes": Part(weight.name, rows=1), "scale": Part(weight.beside("weight_scale"), rows=1)}
    if double is not None and not powers:
        each = prod(double.shape) > 1  # one for each expert
        parts["double"] = Part(weight.beside("weight_scale_2"), rows=int(each))

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        codes, grid = tensors["codes"], scale_values(tensors["scale"])
        if "double" in tensors:
            second = tensors["double"].float()
            grid = grid * (second.view(-1, 1, 1) if second.numel() > 1 else second)
        codes, grid = (each.transpose(-1, -2) if turned else each for each in (codes, grid))
        found = fp4_values(codes)  # [.., out, in]
        found = found * spread(grid, found.shape, (1, size))
        return found.transpose(-1, -2) if turned else found

    whole = (shape[0], 2 * shape[1], shape[2]) if turned else (*shape[:-1], 2 * shape[-1])
    kind = "MXFP4" if powers else "NVFP4"
    return CodeReading(kind, whole, parts, values, scheme=f"{kind.lower()}/{size}")


def _grid(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Shape of the scales for codes of this shape, two in a byte."""
    return (*shape[:-1], 2 * shape[-1] // size)


def _awq(weight: ScaledWeight, scale: TensorInfo) -> CodeReading:
    """Integers of 4 bits from -8, two outputs in a byte, the first in its low half."""
    shape = weight.info.shape
    out, width = (2 * shape[0], shape[1]) if len(shape) == 2 else (0, 0)
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if not groups or scale.shape[0] != out or width % groups:
        raise weight.broken(
            f"is U8 {list(shape)} with scales {scale.dtype} {list(scale.shape)}; integers of 4 bits are [out / 2, in] with "
            "scales [out, groups]: fetch the checkpoint again, or start from the float model"
        )

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        packed = tensors["codes"].int()
        codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1)  # [rows, in]
        codes = (codes ^ 8) - 8  # two's complement of 4 bits
        return codes * spread(tensors["scale"].float(), codes.shape, (1, width // groups))

    parts = {"codes": Part(weight.name, rows=2), "scale": Part(weight.beside("weight_scale"), rows=1)}
    scheme = spelled(4, width // groups, width, offset="none", scale=scale)
    return CodeReading("INT4", (out, width), parts, values, scheme=scheme)


def _decoding(weight: ScaledWeight, reading: CodeReading) -> Decoding:
    """A weight with what was moved from it into its inputs and beside it."""
    source, parts = weight.source, dict(reading.parts)
    a, b, inputs = (weight.part(name) for name in ("svdquant_lora_a", "svdquant_lora_b", "pre_quant_scale"))
    out, width = reading.shape[-2:]
    if a is not None and b is not None:
        if a.shape != (b.shape[-1], width) or b.shape[0] != out:
            raise weight.broken(
                f"is {[out, width]} and its svdquant_lora_a and _b {list(a.shape)} and {list(b.shape)}; fetch the "
                "checkpoint again"
            )
        parts |= {
            "a": Part(weight.beside("svdquant_lora_a")),
            "b": Part(weight.beside("svdquant_lora_b"), rows=1),
        }
    if inputs is not None:
        if prod(inputs.shape) != width:
            raise weight.broken(
                f"has {width} inputs and a pre_quant_scale {list(inputs.shape)}; fetch the checkpoint again"
            )
        parts["inputs"] = Part(weight.beside("pre_quant_scale"))

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        found = reading.values(tensors)
        if "a" in tensors:
            found = found + tensors["b"].float() @ tensors["a"].float()
        return found * tensors["inputs"].float().flatten() if "inputs" in tensors else found

    scale = weight.part("weight_scale")
    assert scale is not None
    info = TensorInfo(weight.info.file, decoded_type(source, scale), reading.shape)
    return Decoding(info, parts, values, upright=len(reading.shape) == 2, scheme=reading.scheme)


MODELOPT = SourceFormat(seen, decode)
