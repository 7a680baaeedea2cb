"""HQQ: integers of 1 to 8 bits whose zero points are floats, as mobiusml's hqq saves them in safetensors.

    W_q uint8 or int32, packed; scale, zero [1, n] or [n, 1]; shape, nbits, group_size, axis, packing, ... one tensor each

    w = (code - zero) * scale, each step rounded to compute_dtype, then reshaped to `shape`

Groups are the columns (axis 0) or the rows (axis 1) of the flattened weight. Fields of a word hold codes that lie far apart:
the highest field has the first part of all rows, the next the second part. So a weight is decoded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import CONFIG_TYPES, spelled
from fracbit.checkpoint.formats.decoding import Decode, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo, read_several
from fracbit.errors import SourceError

CODES = ".W_q"
FIELDS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""By `packing`: the bits of a field, and the fields of a word."""
_NUMBERS = (
    "shape",
    "nbits",
    "group_size",
    "axis",
    "packing",
    "compute_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
)
_UNUSED = (
    *_NUMBERS, "unpack_view_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize",
    "round_zero",
)  # fmt: skip


@dataclass(frozen=True)
class HqqLayer:
    """What a layer stores of itself."""

    shape: tuple[int, int]
    bits: float
    group: int
    axis: int
    packing: str
    dtype: str
    viewed: bool


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether codes of the format are there."""
    return any(name.endswith(CODES) for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` naming a layer that lacks something, or whose shapes do not fit."""
    layers = [name.removesuffix(CODES) for name in source.tensors if name.endswith(CODES)]
    if not layers:
        return Decoded("", {})
    small = read_several(
        source,
        [name for layer in layers for each in _NUMBERS if (name := f"{layer}.{each}") in source.tensors],
    )
    found, widths = {}, set()
    for layer in layers:
        how = _settings(source, layer, small)
        found[f"{layer}.weight"] = _decoding(source, layer, how)
        widths.add(how.bits)
    unused = {name for layer in layers for each in _UNUSED if (name := f"{layer}.{each}") in source.tensors}
    bits = " and ".join(f"{each:g}" for each in sorted(widths))
    return Decoded(f"HQQ, {bits} bits", found, frozenset(unused))


def _settings(source: Source, layer: str, small: Mapping[str, Tensor]) -> HqqLayer:
    def number(name: str, default: float | None = None) -> float:
        if f"{layer}.{name}" in small:
            return float(small[f"{layer}.{name}"])
        if default is None:
            raise SourceError(
                f"{source.name} lacks {layer}.{name}, which says how {layer}{CODES} is packed; fetch the checkpoint again"
            )
        return default

    def text(name: str) -> str:
        return bytes(small[f"{layer}.{name}"].byte().tolist()).decode() if f"{layer}.{name}" in small else ""

    shape = [int(size) for size in small.get(f"{layer}.shape", torch.empty(0))]
    packing, dtype = text("packing"), CONFIG_TYPES.get(text("compute_dtype").removeprefix("torch."), "F16")
    if number("quant_scale", 0) or number("quant_zero", 0):
        raise SourceError(
            f"{source.name}: {layer} has scales or zero points that are quantized themselves, which fracbit does not decode; "
            "start from the float model"
        )
    if len(shape) != 2 or packing not in FIELDS:
        raise SourceError(
            f"{source.name}: {layer} has shape {shape} and packing {packing!r}; fracbit decodes matrices in "
            f"{', '.join(FIELDS)}: fetch the checkpoint again, or start from the float model"
        )
    viewed = bool(number("view_as_float", 0))
    return HqqLayer(
        (shape[0], shape[1]),
        number("nbits"),
        group=int(number("group_size", 0)),
        axis=int(number("axis", 1)),
        packing=packing,
        dtype=dtype,
        viewed=viewed,
    )


def _decoding(source: Source, layer: str, how: HqqLayer) -> Decoding:
    endings = (CODES, ".scale", ".zero")
    missing = [layer + ending for ending in endings if layer + ending not in source.tensors]
    if missing:
        raise SourceError(
            f"{source.name} lacks {missing[0]}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )
    codes, scale, zero = (source.tensors[layer + ending] for ending in endings)
    fields = FIELDS[how.packing][1]
    word = torch.int32 if how.packing == "3bit_32" else torch.uint8
    size = codes.bytes // word.itemsize
    columns = size // codes.shape[0] if codes.shape and codes.shape[0] else 0
    rows = prod(how.shape) // max(columns, 1)
    grids = ((1, columns), (rows, 1), (1, 1), (1,), ())
    enough = (
        len(codes.shape) == 2
        and 0 <= codes.shape[0] * fields - rows < fields
        and rows * columns == prod(how.shape)
    )
    if not enough or scale.shape not in grids or zero.shape not in grids:
        raise SourceError(
            f"{source.name}: {layer} has W_q {list(codes.shape)}, scale {list(scale.shape)} and zero {list(zero.shape)}, which "
            f"do not fit a weight {list(how.shape)} in {how.packing}; fetch the checkpoint again"
        )
    parts = {
        name: Part(layer + ending) for name, ending in zip(("codes", "scale", "zero"), endings, strict=True)
    }
    info = TensorInfo(codes.file, how.dtype, how.shape)
    return Decoding(info, parts, _values(how, rows), scheme=_scheme(how, scale))


def _values(how: HqqLayer, rows: int) -> Decode:
    """From the parts of a layer to its weight [out, in]."""
    bits, fields = FIELDS[how.packing]
    word = torch.int32 if how.packing == "3bit_32" else torch.uint8
    dtype = FLOATS[how.dtype]

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        words = parts["codes"].view(word) if how.viewed else parts["codes"]  # [rows / fields, columns]
        found = torch.cat([words >> bits * place & 2**bits - 1 for place in reversed(range(fields))])[:rows]
        scaled = (found.to(dtype) - parts["zero"].to(dtype)) * parts["scale"].to(dtype)  # [rows, columns]
        return scaled.reshape(how.shape)

    return values


def _scheme(how: HqqLayer, scale: TensorInfo) -> str:
    """Groups along the inputs are a scheme of fracbit; others are named by what they are."""
    width = how.shape[1]
    group = how.group or width
    if how.axis == 1 and width % group == 0 and float(how.bits).is_integer():
        return spelled(int(how.bits), group, width, offset="float", scale=scale)
    return f"hqq{how.bits:g}, groups of {group} along axis {how.axis}"


HQQ = SourceFormat(seen, decode)
