"""bitsandbytes, 4 and 8 bits, as transformers saves it.

    weight uint8 [out in / 2, 1], weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (JSON in bytes)
    weight int8 [out, in], SCB fp32 [out]                                              w = code * SCB / 127

Codes of 4 bits run through the whole matrix, the first of a byte in its high half, in blocks that share a largest magnitude:
w = map[code] * absmax. With double quantization absmax itself is in 8 bits: nested_map[code] * nested_absmax + an offset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import CONFIG_TYPES, config_type
from fracbit.checkpoint.formats.decoding import NUMBERS, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo, read_rows, read_stored
from fracbit.errors import SourceError
from fracbit.records.files import parse_json

STATE = ".weight.quant_state.bitsandbytes__"
EIGHT = (".SCB", ".weight_format")


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a state of 4-bit codes, or scales of 8-bit ones, lie beside a weight."""
    return any(STATE in name or name.endswith(".SCB") for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` naming a tensor that is missing or does not fit."""
    found: dict[str, Decoding] = {}
    unused: set[str] = set()
    kinds: set[str] = set()
    for name in source.tensors:
        layer, _, kind = name.partition(STATE)
        if kind:
            found[f"{layer}.weight"] = _four(source, layer, name)
            unused.add(name)
            kinds.add(f"{kind}, 4 bits")
        elif name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            found[f"{layer}.weight"] = _eight(source, layer)
            kinds.add("int, 8 bits")
        unused |= {name} if name.endswith(".weight_format") else set()
    _check_left(source, found)
    return Decoded(f"bitsandbytes {'; '.join(sorted(kinds))}", found, frozenset(unused))


def _check_left(source: Source, found: Mapping[str, Decoding]) -> None:
    """Raise `SourceError` for codes without their state, and numbers without their codes."""
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    for name, info in source.tensors.items():
        codes = name.endswith(".weight") and info.dtype in ("U8", "I8")
        if (codes or name.endswith((".weight.absmax", ".weight.quant_map"))) and name not in parts:
            raise SourceError(
                f"{source.name} holds {name} in {info.dtype}, and what belongs to it is not there; fetch the checkpoint again"
            )


def _held(source: Source, name: str) -> TensorInfo:
    if name not in source.tensors:
        raise SourceError(
            f"{source.name} lacks {name}, without which the codes beside it mean nothing; fetch the checkpoint again"
        )
    return source.tensors[name]


def _eight(source: Source, layer: str) -> Decoding:
    """A row's codes times its largest magnitude, over 127."""
    codes, scale = _held(source, f"{layer}.weight"), source.tensors[f"{layer}.SCB"]
    if codes.dtype != "I8" or len(codes.shape) != 2 or scale.shape != codes.shape[:1]:
        raise SourceError(
            f"{source.name}: {layer}.weight is {codes.dtype} {list(codes.shape)} and {layer}.SCB {list(scale.shape)}; codes "
            "of 8 bits are I8 [out, in] with one number for each row: fetch the checkpoint again"
        )
    layout = f"{layer}.weight_format"
    if layout in source.tensors and int(read_stored(source, layout).flatten()[0]) != 0:
        raise SourceError(
            f"{source.name}: {layer}.weight lies in tiles of a GPU, not row by row; save the model again with bitsandbytes "
            "0.45 or newer"
        )

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        return parts["codes"].float() * parts["scale"].float()[:, None] * (1 / 127)  # [rows, in]

    parts = {"codes": Part(f"{layer}.weight", rows=1), "scale": Part(f"{layer}.SCB", rows=1, kinds=NUMBERS)}
    info = TensorInfo(codes.file, config_type(source.config), codes.shape)
    return Decoding(info, parts, values, scheme="int8/row")


def _four(source: Source, layer: str, state_name: str) -> Decoding:
    """Values of a table times the largest magnitude of their block."""
    state = _state(source, state_name)
    weight = f"{layer}.weight"
    codes, scale = _held(source, weight), _held(source, f"{weight}.absmax")
    _held(source, f"{weight}.quant_map")
    (out, width), block = state["shape"], int(state["blocksize"])
    blocks = -(-out * width // block)
    if codes.shape[0] != -(-out * width // 2) or scale.shape != (blocks,):
        raise SourceError(
            f"{source.name}: {weight} has {codes.shape[0]} bytes and {list(scale.shape)} magnitudes, and {out} x {width} codes "
            f"of 4 bits in blocks of {block} take {-(-out * width // 2)} and {blocks}; fetch the checkpoint again"
        )
    parts = {
        "codes": replace(_part(weight, width, 2), kinds=("U8",)),
        "scale": _part(f"{weight}.absmax", width, block),
        "map": Part(f"{weight}.quant_map", kinds=NUMBERS),
    }
    nested = int(state.get("nested_blocksize") or 0)
    offset = float(state.get("nested_offset") or 0)
    if nested:
        for each in ("nested_absmax", "nested_quant_map"):
            _held(source, f"{weight}.{each}")
        parts["outer"] = _part(f"{weight}.nested_absmax", width, block * nested)
        parts["outer map"] = Part(f"{weight}.nested_quant_map", kinds=NUMBERS)
    elif scale.dtype == "U8":
        raise SourceError(
            f"{source.name}: {weight}.absmax is in 8 bits, and {state_name} says nothing of that; fetch the checkpoint again"
        )

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        packed = tensors["codes"].flatten()
        rows = 2 * len(packed) // width
        found = torch.stack([packed >> 4, packed & 15], -1).flatten()[: rows * width]  # [rows * in]
        largest = tensors["scale"]
        if nested:
            outer = tensors["outer"].float().repeat_interleave(nested)[: len(largest)]
            largest = tensors["outer map"].float()[largest.long()] * outer + offset
        spread = largest.float().repeat_interleave(block)[: rows * width]
        return (tensors["map"].float()[found.long()] * spread).view(rows, width)  # [rows, in]

    dtype = CONFIG_TYPES.get(str(state.get("dtype")), config_type(source.config))
    scheme = f"{state.get('quant_type') or 'table of 4 bits'}/flat:{block}"
    return Decoding(TensorInfo(codes.file, dtype, (out, width)), parts, values, scheme=scheme)


def _part(name: str, width: int, size: int) -> Part:
    """A part with one index for every `size` weights of a matrix whose rows have `width`, through the end of rows."""
    rows = size // math.gcd(width, size)
    return Part(name, rows=rows, units=rows * width // size)


def _state(source: Source, name: str) -> dict[str, Any]:
    """The JSON object of a state. Raises `SourceError` for another one."""
    info = source.tensors[name]
    try:
        content = bytes(read_rows(source, name, [slice(0, *info.shape[:1])]).tolist())
        state = parse_json(content, f"{source.name}: {name}", SourceError)
        fits = len(state["shape"]) == 2 and int(state["blocksize"]) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{source.name}: {name} cannot be read ({error}); fetch the checkpoint again"
        ) from error
    if not fits:
        raise SourceError(
            f"{source.name}: {name} is of a weight {state['shape']}, and fracbit decodes matrices; start from the float model"
        )
    return state


BITSANDBYTES = SourceFormat(seen, decode)
