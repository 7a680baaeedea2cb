"""compressed-tensors, the format of llm-compressor: integers and floats of 1 to 8 bits, by groups, rows, blocks or whole.

    weight_packed int32 [out, ceil(in b / 32)], weight_shape, weight_scale            w = (code - 2^(b-1) - zero) * scale
    weight int8 or float8 [out, in], weight_scale                                     w = (code - zero) * scale
    weight_packed uint8 [out, in / 2] (E2M1), weight_scale float8 [out, in / 16],
    weight_global_scale                                                               w = code * scale / global
    the same with scales in uint8 [out, in / 32] and none for all (MXFP4)             w = code * 2^(scale - 127)

Zero points of packed integers are packed too, along `out`, and signed as the codes are. Widths that do not divide 32 were
packed word by word until 2026, and in one stream since; the shapes tell which. `config_groups` say the width of each layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import (
    Patch,
    block_of,
    decoded_type,
    fp4_values,
    spelled,
    spread,
    unpack_words,
    words_for,
)
from fracbit.checkpoint.formats.decoding import INDICES, NUMBERS, POWERS, Decoding, Part
from fracbit.checkpoint.formats.integers import StoredIntegers
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import Source, TensorInfo, read_rows
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values
from fracbit.records.scheme import Offset

PACKED, PLAIN = ".weight_packed", ".weight"
WRITTEN = {"codes": PACKED, "scale": ".weight_scale"}
BYTES = ("I8", "F8_E4M3", "F8_E5M2")
"""Types of codes that fill a byte each."""
KNOWN = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
WEIGHT_PARTS = (".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale", PACKED)
RUN_TIME = (
    ".weight_shape", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
DENSE_SINCE = (0, 18)
"""The version from which on codes of any width are one stream of bits in a row."""
Unpack = Callable[[Tensor, int, int], Tensor]
"""From words [rows, n], bits and a count to codes [rows, count]."""


@dataclass(frozen=True)
class CodedLayer:
    """A quantized layer: its module's name, its source, and the arguments of its weights in the config."""

    source: Source
    module: str
    args: Mapping[str, Any]
    version: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.args.get("num_bits") or 8)

    def info(self, ending: str) -> TensorInfo:
        """The header of one of its tensors. Raises `SourceError` where the file lacks it."""
        name = self.module + ending
        if name not in self.source.tensors:
            raise self.broken(
                f"has no {name}, without which its codes mean nothing; fetch the checkpoint again"
            )
        return self.source.tensors[name]

    def holds(self, ending: str) -> bool:
        """Whether the file has one of its tensors."""
        return self.module + ending in self.source.tensors

    def broken(self, what: str) -> SourceError:
        """An error about this layer."""
        return SourceError(f"{self.source.name}: layer {self.module} {what}")


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether codes and scales of the format are there."""
    return any(_is_coded(name, info, tensors) for name, info in tensors.items())


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized layer. Raises `SourceError` for a scheme that is not known, and naming a tensor for what does not fit."""
    tensors = source.tensors
    coded = [name for name, info in tensors.items() if _is_coded(name, info, tensors)]
    _check_settings(source, settings, bool(coded))
    found: dict[str, Decoding] = {}
    kinds: dict[str, set[int]] = {}
    for name in coded:
        module = name.removesuffix(PACKED).removesuffix(PLAIN)
        layer = CodedLayer(source, module, _arguments(source, settings, module), _version(settings))
        kind, decoding = _packed(layer) if name.endswith(PACKED) else _bytes(layer)
        found[f"{module}.weight"] = replace(decoding, scheme=_scheme(layer, kind, decoding.info.shape))
        kinds.setdefault(kind, set()).add(layer.bits)
    parts = {part.name for decoding in found.values() for part in decoding.parts.values()}
    left = [name for name in tensors if name.endswith(WEIGHT_PARTS) and name not in parts]
    if left:
        raise SourceError(
            f"{source.name} holds {left[0]}, and no codes that belong to it: its weights were not compressed when it was "
            "saved, or the file is damaged; save it again with llm-compressor (save_compressed=True), or use the float model"
        )
    title = "; ".join(
        f"{kind}, {' and '.join(map(str, sorted(bits)))} bits" for kind, bits in sorted(kinds.items())
    )
    unused = frozenset(name for name in tensors if name.endswith(RUN_TIME))
    return Decoded(f"compressed-tensors {title}", found, unused, _notes(settings))


def _scheme(layer: CodedLayer, kind: str, shape: Sequence[int]) -> str:
    """How a layer is stored, by the shape of its scales."""
    scale = layer.info(".weight_scale")
    out, groups = scale.shape if len(scale.shape) == 2 else (1, 1)
    size, rows = shape[1] // groups, -(-shape[0] // out)
    if kind == "int" and rows == 1 and shape[0] > 1:
        offset: Offset = "none" if layer.args.get("symmetric", True) else "zero"
        return spelled(layer.bits, size, shape[1], offset=offset, scale=scale)
    return f"{kind}{layer.bits if kind == 'int' else ''}, {rows} x {size}"


def _version(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The version of compressed-tensors that wrote the file; empty where the config does not say."""
    found = re.match(r"(\d+)\.(\d+)", str(settings.get("version") or ""))
    return tuple(map(int, found.groups())) if found else ()


def _is_coded(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor holds codes: packed ones, or bytes with a scale beside them."""
    if name.endswith(PACKED):
        return True
    return info.dtype in BYTES and name.endswith(PLAIN) and f"{name}_scale" in tensors


def _check_settings(source: Source, settings: Mapping[str, Any], coded: bool) -> None:
    """Raise `SourceError` for what a config asks for beyond scales: sparsity, rotations, formats that are not known."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    named = [settings.get("format"), *(group.get("format") for group in groups)]
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    unknown = [str(name) for name in named if name and name not in KNOWN]
    if unknown or sparse != "dense":
        raise SourceError(
            f"{source.name} is compressed-tensors of the format {unknown[0] if unknown else sparse}; fracbit decodes "
            f"{', '.join(KNOWN)}: start from the float model"
        )
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise SourceError(
            f"{source.name} has weights that were rotated before they were rounded (transform_config), and its model "
            "multiplies by rotations that a plain one does not have; start from the float model"
        )
    if coded and not groups:
        raise SourceError(
            f"{source.name} holds codes of compressed-tensors, and its config has no config_groups that say their bits; "
            "restore quantization_config in config.json"
        )


def _notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    groups = (settings.get("config_groups") or {}).values()
    if not any(isinstance(group, dict) and group.get("input_activations") for group in groups):
        return ()
    return (
        "the source rounds the activations of its layers while it runs; the decoded weights are used without that",
    )


def _arguments(source: Source, settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What `config_groups` say of a module's weights: a target that is its name, then a pattern, then a class of modules."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    ranked: list[tuple[int, Mapping[str, Any]]] = []
    for group in groups:
        for target in group.get("targets") or ():
            pattern = str(target).removeprefix("re:")
            if target == module:
                ranked.append((0, group))
            elif pattern != target and re.match(pattern, module):
                ranked.append((1, group))
            elif (
                pattern == target and target[:1].isupper()
            ):  # a class, such as Linear; names of modules are in lower case
                ranked.append((2, group))
    best = min(ranked, key=lambda pair: pair[0], default=(0, {}))[1]
    args = best.get("weights")
    if not isinstance(args, dict):
        raise SourceError(
            f"{source.name}: layer {module} is quantized, and no group of config_groups has weights for it; compare "
            "quantization_config in config.json with the released one"
        )
    return args


def _packed(layer: CodedLayer) -> tuple[str, Decoding]:
    """A layer whose codes are packed: integers in words, or E2M1 in bytes."""
    codes = layer.info(PACKED)
    if codes.dtype == "U8":
        return _fp4(layer)
    if codes.dtype != "I32" or len(codes.shape) != 2:
        raise layer.broken(
            f"has {PACKED[1:]} {codes.dtype} {list(codes.shape)}; fracbit reads I32 [out, words] and U8 [out, in / 2]: start "
            "from the float model"
        )
    bits = layer.bits
    if layer.args.get("type", "int") != "int" or not 1 <= bits <= 8:
        raise layer.broken(
            f"has codes in words, and config.json calls them {layer.args.get('type')} of {bits} bits"
        )
    out, width = _logical_shape(layer)
    unpack = _unpacker(layer, codes.shape, (out, width))
    # One stream ends a word after 32 / gcd(32, b) codes; codes that were packed word by word after 32 // b of them.
    stream = unpack is unpack_words
    rows = 32 // math.gcd(32, bits) if stream else 32 // bits
    zero_rows = Part(f"{layer.module}.weight_zero_point", rows=rows, units=rows * bits // 32 if stream else 1)
    zero_of = partial(_zero, unpack=unpack, bits=bits)
    decoding = _scaled(
        layer,
        (out, width),
        Part(layer.module + PACKED, rows=1),
        lambda words: unpack(words, bits, width).float() - float(2 ** (bits - 1)),
        packed_zero=(zero_rows, zero_of),
    )

    def integers(parts: Mapping[str, Tensor]) -> StoredIntegers:
        codes, scale = unpack(parts["codes"], bits, width), parts["scale"]  # [out, in], [out, groups]
        scale = scale.reshape(1, -1).expand(out, -1) if scale.numel() == 1 else scale.reshape(len(codes), -1)
        zero = parts.get("zero")
        if zero is not None:
            signed = zero_of(zero, out) if zero.dtype == torch.int32 else zero.reshape(scale.shape).float()
            zero = (signed + 2 ** (bits - 1)).byte()  # [out, groups]
        order = parts.get("order")
        plain = torch.arange(width) // -(-width // scale.shape[1])  # [in]
        size = int(layer.args.get("group_size") or 0)
        plain = torch.arange(width) // size if size > 0 and scale.shape[1] > 1 else plain
        groups = plain if order is None or bool((order == -1).all()) else order.long()
        return StoredIntegers(
            bits, codes, scale, zero, groups=groups, packer="compressed-tensors", written=WRITTEN
        )

    return "int", replace(decoding, codes=integers)


def _zero(words: Tensor, rows: int, unpack: Unpack, bits: int) -> Tensor:
    """Zero points fp32 [rows, groups] of words [n, groups] that hold them along the rows."""
    codes = unpack(words.T.contiguous(), bits, rows).T  # [rows, groups]
    return codes.float() - float(2 ** (bits - 1))


def _logical_shape(layer: CodedLayer) -> tuple[int, int]:
    """[out, in] as `weight_shape` says."""
    info = layer.info(".weight_shape")
    found = read_rows(layer.source, f"{layer.module}.weight_shape", [slice(0, *info.shape[:1])])
    shape = [int(size) for size in found.flatten()]
    if len(shape) != 2:
        raise layer.broken(f"has a weight_shape of {len(shape)} numbers, and a matrix has two")
    return shape[0], shape[1]


def _unpacker(layer: CodedLayer, words: tuple[int, ...], shape: tuple[int, int]) -> Unpack:
    """How the words of a row are unpacked. Raises `SourceError` where they do not hold the codes of a row."""
    (out, width), bits = shape, layer.bits
    stream, padded = words_for(width, bits), -(-width // (32 // bits))
    fits = [size for size in {stream, padded} if words == (out, size)]
    if not fits:
        raise layer.broken(
            f"has weight_packed {list(words)}, and {out} x {width} codes of {bits} bits take {[out, stream]} or "
            f"{[out, padded]}; compare config_groups in config.json with the released ones"
        )
    dense = bool(layer.version and layer.version >= DENSE_SINCE)
    if stream == padded and 32 % bits and width > 32 // bits and not dense:
        raise layer.broken(
            f"has rows of {width} codes of {bits} bits, too short to tell one stream of bits from words of {32 // bits} codes; "
            "start from the float model"
        )
    return unpack_words if stream in fits and (dense or padded not in fits) else _unpack_padded


def _unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 [rows, count] of words int32 [rows, n] with 32 // bits codes each, the first in the lowest bits."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: Tensor = (words[..., None] >> shifts) & 2**bits - 1  # [rows, n, 32 // bits]
    return codes.to(torch.uint8).flatten(1)[:, :count]  # [rows, count]


def _bytes(layer: CodedLayer) -> tuple[str, Decoding]:
    """A layer with a byte for each code: int8 or fp8."""
    info = layer.info(PLAIN)
    integer = info.dtype == "I8"
    if (layer.args.get("type", "int") == "int") is not integer:
        raise layer.broken(
            f"has a weight in {info.dtype}, and config.json calls its type {layer.args.get('type')}"
        )
    if len(info.shape) != 2:
        raise layer.broken(
            f"has a weight of shape {list(info.shape)}; fracbit reads matrices: start from the float model"
        )
    out, width = info.shape
    part = Part(layer.module + PLAIN, rows=1)
    return "int" if integer else "fp8", _scaled(layer, (out, width), part, lambda codes: codes.float())


def _fp4(layer: CodedLayer) -> tuple[str, Decoding]:
    """E2M1: with scales in fp8 and one for the whole matrix (NVFP4), or powers of two alone (MXFP4)."""
    codes, scale = layer.info(PACKED), layer.info(".weight_scale")
    shape = codes.shape[0], 2 * codes.shape[-1]
    part = Part(layer.module + PACKED, rows=1)
    powers = scale.dtype in ("U8", "F8_E8M0")
    if not powers:
        layer.info(".weight_global_scale")
    if len(codes.shape) != 2 or layer.args.get("type") != "float" or layer.bits != 4:
        raise layer.broken(
            f"has weight_packed in U8 {list(codes.shape)}, which holds floats of 4 bits, and config.json calls them "
            f"{layer.args.get('type')} of {layer.bits} bits"
        )
    return "mxfp4" if powers else "nvfp4", _scaled(layer, shape, part, fp4_values, group=32 if powers else 16)


def _scaled(
    layer: CodedLayer,
    shape: tuple[int, int],
    codes: Part,
    values: Callable[[Tensor], Tensor],
    *,
    packed_zero: tuple[Part, Callable[[Tensor, int], Tensor]] | None = None,
    group: int | None = None,
) -> Decoding:
    """(values of the codes - zero point) * scale, over the grid that the config says; `group`: columns where it does not."""
    scale = layer.info(".weight_scale")
    block = _block(layer, shape, scale, group)
    rows = block[0] if block[0] < shape[0] else 0
    kinds = (*NUMBERS, *POWERS, "F8_E4M3")
    parts = {"codes": codes, "scale": Part(f"{layer.module}.weight_scale", rows=rows, kinds=kinds)}
    zero_of: Callable[[Tensor, int], Tensor] = lambda zero, rows: zero.float()  # noqa: E731
    if layer.holds(".weight_zero_point"):
        zero, zero_of = _zero_part(
            layer, scale, Part(f"{layer.module}.weight_zero_point", rows=rows), packed_zero
        )
        parts["zero"] = zero
    elif layer.args.get("symmetric", True) is False:
        layer.info(".weight_zero_point")
    if layer.holds(".weight_global_scale"):
        parts["global"] = Part(f"{layer.module}.weight_global_scale", kinds=NUMBERS)
    if layer.holds(".weight_g_idx"):
        parts["order"] = Part(f"{layer.module}.weight_g_idx", kinds=INDICES)

    def decoded(tensors: Mapping[str, Tensor]) -> Tensor:
        found = values(tensors["codes"])  # [rows, in]
        grid = scale_values(tensors["scale"])
        grid = grid / tensors["global"].float() if "global" in tensors else grid
        order = tensors.get("order")
        order = None if order is None or bool((order == -1).all()) else order  # [in]
        if order is not None and not 0 <= int(order.min()) <= int(order.max()) < grid.shape[1]:
            raise layer.broken(
                f"has weight_g_idx outside of its {grid.shape[1]} groups; fetch the file again"
            )
        place = partial(_placed, shape=found.shape, block=block, order=order)
        if "zero" in tensors:
            found = found - place(zero_of(tensors["zero"], len(found)))
        return found * place(grid)

    info = layer.info(PACKED if layer.holds(PACKED) else PLAIN)
    return Decoding(TensorInfo(info.file, decoded_type(layer.source, scale), shape), parts, decoded)


def _zero_part(
    layer: CodedLayer,
    scale: TensorInfo,
    plain: Part,
    packed: tuple[Part, Callable[[Tensor, int], Tensor]] | None,
) -> tuple[Part, Callable[[Tensor, int], Tensor]]:
    """The zero points: words along the rows, or a number for each scale. Raises `SourceError` for another shape."""
    info = layer.info(".weight_zero_point")
    if packed is not None and info.dtype == "I32":
        part = packed[0]
        words = -(-scale.shape[0] // part.rows) * part.units
        short = -(-scale.shape[0] * part.units // part.rows)
        if len(scale.shape) == 2 and info.shape[1:] == scale.shape[1:] and info.shape[0] in (words, short):
            return packed
    elif info.shape == scale.shape:
        return plain, lambda zero, rows: zero.float()
    raise layer.broken(
        f"has weight_zero_point {info.dtype} {list(info.shape)}, which does not fit weight_scale {list(scale.shape)}; fetch "
        "the checkpoint again"
    )


def _block(layer: CodedLayer, shape: tuple[int, int], scale: TensorInfo, group: int | None) -> Patch:
    """Rows and columns that share a scale. Raises `SourceError` where the shape of the scales is another."""
    asked = layer.args.get("block_structure")
    size = int(layer.args.get("group_size") or group or 0)
    usual = (int(asked[0]), int(asked[1])) if asked else (1, size if size > 0 else shape[1])
    block = block_of(shape, scale.shape, None, usual)
    if block is None:
        raise layer.broken(
            f"has weight_scale {list(scale.shape)}, which is no grid for a weight {list(shape)} with one scale for "
            f"{usual[0]} x {usual[1]} weights; compare config_groups in config.json with the released ones"
        )
    return block


def _placed(grid: Tensor, shape: Sequence[int], block: Patch, order: Tensor | None) -> Tensor:
    """A grid of numbers over the weights. `order` [in] names the group of every column."""
    if order is not None:
        return grid[:, order.long()]  # [rows, in]
    return spread(grid, shape, block)


COMPRESSED_TENSORS = SourceFormat(seen, decode)
