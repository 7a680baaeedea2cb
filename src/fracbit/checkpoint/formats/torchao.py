"""torchao, as transformers saves it in safetensors: each weight as a tensor class, taken apart.

    {module}._weight_qdata, {module}._weight_scale, {module}._weight_zero_point, ...

The metadata in the header of a file say of each weight its class (`_type`) and what is no tensor (`_data`).

    Float8Tensor              qdata float8 [.., out, in], scale by block                    code * scale
    Int8Tensor                qdata int8 [.., out, in], scale and zero_point by block       (code - zero) * scale
    IntxUnpackedToInt8Tensor  the same, with codes of 1 to 8 bits
    Int4Tensor                qdata int8 [.., out, in / 2] from -8, the first in the low half,
                              scale and zero_point [.., groups, out]                        code * scale + zero
    Int4TilePackedTo4dTensor  qdata int32 [out / 8, in / 128, 32, 4], scale_and_zero [groups, out, 2]
                                                                                            (code - 8) * scale + zero
    MXTensor, NVFP4Tensor     small floats with scales for 32 or 16 of them; per_tensor_scale

`act_pre_scale` multiplies the inputs, so it is multiplied into the weights. Steps are rounded as torchao rounds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import CONFIG_TYPES, decoded_type, fp4_values, spread
from fracbit.checkpoint.formats.decoding import Decode, Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo, read_metadata
from fracbit.errors import SourceError
from fracbit.numerics.packed import scale_values

CODES = "_qdata"
FP8 = ("F8_E4M3", "F8_E5M2")
PARTS = ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
"""Tensors of a weight that its values need; others are for activations."""


@dataclass(frozen=True)
class FlattenedTensor:
    """A weight by its name, with its class, its attributes, and the headers of its parts by their short names."""

    source: Source
    name: str
    kind: str
    data: Mapping[str, Any]
    held: Mapping[str, TensorInfo]

    def stored(self, part: str) -> str:
        """The name of a part in the file."""
        return _stored(self.name, part)

    def block(self) -> tuple[int, ...]:
        """Weights along each axis that share a scale."""
        asked = self.data.get("block_size") or ()
        return tuple(int(size) for size in (asked if isinstance(asked, list) else [asked] if asked else ()))

    def dtype(self, *names: str) -> str:
        """The float type that an attribute names, else that of the scales if it has 16 bits, else the config's."""
        for name in names:
            named = self.data.get(name)
            named = named.get("_data") if isinstance(named, dict) else named
            if named in CONFIG_TYPES:
                return CONFIG_TYPES[named]
        scale = self.held.get("scale") or self.held["scale_and_zero"]
        return decoded_type(self.source, scale)

    def broken(self) -> SourceError:
        """An error about its shapes."""
        shapes = ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in self.held.items())
        return SourceError(
            f"{self.source.name}: {self.name} is a {self.kind} with {shapes} and blocks of {list(self.block())}, which do not "
            "fit each other; fetch the checkpoint again"
        )


@dataclass(frozen=True, eq=False)
class ClassReading:
    """How a weight is read: its type and shape, its values, and `steps`: rows in one step of each part, and its axis.

    A step of codes is one index for each row, or a tile of rows.
    """

    dtype: str
    shape: tuple[int, ...]
    steps: Mapping[str, tuple[int, int]]
    values: Decode
    scheme: str


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the codes of a tensor class are there."""
    return any(_weight_of(name) for name in tensors)


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every quantized weight. Raises `SourceError` for a class that is not known, and naming a weight that does not fit."""
    names = [weight for weight in map(_weight_of, source.tensors) if weight]
    if not names:
        return Decoded("", {})
    metadata = read_metadata(source)
    found: dict[str, Decoding] = {}
    kinds: set[str] = set()
    unused: set[str] = set()
    for name in names:
        kind, data = _class_of(source, name, metadata)
        held = {part: info for part in PARTS if (info := source.tensors.get(_stored(name, part))) is not None}
        weight = FlattenedTensor(source, name, kind, data, held=held)
        if kind not in CLASSES:
            raise SourceError(
                f"{source.name}: {name} is a {kind} of torchao; fracbit decodes {', '.join(CLASSES)}: start from the float "
                "model"
            )
        found[name] = _decoding(weight, CLASSES[kind](weight))
        kinds.add(kind.removesuffix("Tensor"))
        prefix = _stored(name, "")
        used = {part.name for part in found[name].parts.values()}
        unused |= {each for each in source.tensors if each.startswith(prefix) and each not in used}
    return Decoded(f"torchao {', '.join(sorted(kinds))}", found, frozenset(unused))


def _stored(name: str, part: str) -> str:
    """The name in the file of a part of a weight."""
    module, _, own = name.rpartition(".")
    return f"{module}._{own}_{part}"


def _weight_of(name: str) -> str:
    """The weight whose codes a stored tensor holds; "" for other tensors."""
    module, _, own = name.rpartition(".")
    if not own.startswith("_") or not own.endswith(CODES):
        return ""
    return f"{module}.{own[1:].removesuffix(CODES)}"


def _class_of(source: Source, name: str, metadata: Mapping[str, str]) -> tuple[str, Mapping[str, Any]]:
    """The class of a weight and its attributes. Raises `SourceError` where the metadata do not say."""
    try:
        entry = json.loads(metadata[name])
        return str(entry["_type"]), dict(entry.get("_data") or {})
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{source.name} holds codes of torchao for {name}, and the metadata in the header of its file do not say how they "
            "are packed; fetch the checkpoint again"
        ) from error


def _decoding(weight: FlattenedTensor, reading: ClassReading) -> Decoding:
    """A weight with what its inputs are multiplied by."""
    parts = {
        part: Part(weight.stored(part), rows=rows, axis=axis) for part, (rows, axis) in reading.steps.items()
    }
    inputs = weight.held.get("act_pre_scale")
    if inputs is not None:
        if prod(inputs.shape) != reading.shape[-1]:
            raise weight.broken()
        parts["inputs"] = Part(weight.stored("act_pre_scale"))

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        found = reading.values(tensors)
        return found.float() * tensors["inputs"].float().flatten() if "inputs" in tensors else found

    info = TensorInfo(weight.held["qdata"].file, reading.dtype, reading.shape)
    return Decoding(info, parts, values, upright=len(reading.shape) == 2, scheme=reading.scheme)


def _by_block(weight: FlattenedTensor) -> ClassReading:
    """A byte for each code: floats, or integers with zero points; those are subtracted in the type of the weight."""
    codes, scale, zero = (weight.held.get(part) for part in ("qdata", "scale", "zero_point"))
    assert codes is not None
    shape, block = codes.shape, weight.block() or codes.shape
    integer = codes.dtype == "I8"
    if scale is None or len(block) != len(shape) or not all(block) or not (integer or codes.dtype in FP8):
        raise weight.broken()
    grid = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
    fits = scale.shape == grid or prod(scale.shape) == 1
    if not fits or (zero is not None and zero.shape != scale.shape):
        raise weight.broken()
    dtype = weight.dtype("dtype")
    work = FLOATS[dtype] if integer else torch.float32

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        found = tensors["qdata"].to(work)
        if "zero_point" in tensors:
            found = found - _placed(tensors["zero_point"].to(work), found.shape, block)
        return found * _placed(tensors["scale"], found.shape, block)

    names = ("scale", "zero_point") if zero is not None and integer else ("scale",)
    steps = {"qdata": (1, 0), **dict.fromkeys(names, (block[0] if grid[0] > 1 else 0, 0))}
    return ClassReading(
        dtype, shape, steps, values, scheme=f"{'int8' if integer else 'fp8'}, {' x '.join(map(str, block))}"
    )


def _placed(grid: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """A grid of numbers, or one number, over weights of this shape."""
    return grid.flatten() if grid.numel() == 1 else spread(grid, shape, (block[-2], block[-1]))


def _int4(weight: FlattenedTensor) -> ClassReading:
    """Two codes in a byte, the first in the low half, as signed integers of 4 bits."""
    codes, scale, zero = (weight.held.get(part) for part in ("qdata", "scale", "zero_point"))
    assert codes is not None
    *stack, out, half = codes.shape
    group = weight.block()[-1] if weight.block() else 0
    fits = scale is not None and zero is not None and group > 0 and codes.dtype in ("I8", "U8")
    if not fits or not scale.shape == zero.shape == (*stack, -(-2 * half // group), out):  # type: ignore[union-attr]
        raise weight.broken()

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        packed = tensors["qdata"].view(torch.uint8).int()
        found = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)  # [.., out, in]
        scale, zero = (
            tensors[part].float().transpose(-1, -2).repeat_interleave(group, -1)[..., : 2 * half]
            for part in ("scale", "zero_point")
        )
        return ((found ^ 8) - 8) * scale + zero

    step = (1, 0 if stack else 1)
    steps = {"qdata": (1, 0), "scale": step, "zero_point": step}
    return ClassReading(weight.dtype(), (*stack, out, 2 * half), steps, values, scheme=f"int4f/{group}")


def _tiles(weight: FlattenedTensor) -> ClassReading:
    """Words as the threads of a tensor core load them: thread 4 n + q has, of output n, inputs 8 i + 2 q and 8 i + 2 q + 1.

    Four of the first (i = 0 .. 3) fill the low half of a word, four of the second the high half. ROCm has another order in
    tensors of the same shape; transformers writes files on both, and this is the one of CUDA.
    """
    codes, scale = weight.held["qdata"], weight.held.get("scale_and_zero")
    shape = tuple(int(size) for size in weight.data.get("shape") or ())
    group = weight.block()[-1] if weight.block() else 0
    if len(codes.shape) != 4 or len(shape) != 2 or codes.shape[2] != 32 or codes.dtype != "I32":
        raise weight.broken()
    padded, wide = 8 * codes.shape[0], codes.shape[1] * codes.shape[3] * 32
    fits = scale is not None and group > 0 and scale.shape == (wide // group, padded, 2)
    if not fits or not (0 <= padded - shape[0] < 16 and shape[1] <= wide):
        raise weight.broken()
    pairs, width = codes.shape[3], shape[1]

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        halves = tensors["qdata"][..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
        tiles = halves.unflatten(2, (8, 4)).unflatten(-1, (2, 4))  # [n, k, output, q, pair, which of two, i]
        assert tiles.shape[4] == pairs
        found = tiles.permute(0, 2, 1, 4, 6, 3, 5).flatten(2).flatten(0, 1)  # [outputs, in]
        scale, zero = (
            part.float().T.repeat_interleave(group, 1) for part in tensors["scale_and_zero"].unbind(-1)
        )
        weights: Tensor = (found[: len(scale)] - 8) * scale + zero
        return weights[:, :width]

    steps = {"qdata": (8, 0), "scale_and_zero": (1, 1)}
    return ClassReading(weight.dtype(), (shape[0], shape[1]), steps, values, scheme=f"int4f/{group}")


def _small(weight: FlattenedTensor) -> ClassReading:
    """Floats of 4 or 8 bits with a scale for each block of inputs, in rows or in tiles of a GPU, and one for the whole."""
    codes, scale, whole = (weight.held.get(part) for part in ("qdata", "scale", "per_tensor_scale"))
    assert codes is not None
    size = weight.block()[-1] if weight.block() else 0
    four = codes.dtype == "U8"
    if scale is None or len(codes.shape) < 2 or size < 1 or not (four or codes.dtype in FP8):
        raise weight.broken()
    *stack, out, width = codes.shape
    width *= 2 if four else 1
    tiled, grid = bool(weight.data.get("is_swizzled_scales")), (*stack, out, width // size)
    wide = -(-width // size // 4)  # tiles of 128 rows and 4 scales, side by side
    wanted = (-(-out // 128) * 32, wide * 16) if tiled else grid
    if (
        scale.shape != wanted
        or width % size
        or (tiled and stack)
        or (whole and prod(whole.shape) not in (1, *stack))
    ):
        raise weight.broken()

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        stored = tensors["qdata"]
        found = fp4_values(stored) if four else stored.float()  # [.., out, in]
        scales = scale_values(tensors["scale"])
        if tiled:
            tiles = scales.reshape(-1, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)  # [n, 4, 32, wide, 4]
            scales = tiles.reshape(-1, 4 * wide)[: len(found), : grid[-1]]
        if "per_tensor_scale" in tensors:
            scales = tensors["per_tensor_scale"].float() * scales
        return found * spread(scales, found.shape, (1, size))

    step = (int(not tiled), 0)  # with tiles, the whole weight
    steps = {"qdata": step, "scale": step}
    if whole is not None:
        steps["per_tensor_scale"] = (int(prod(whole.shape) > 1), 0)
    name = "nvfp4" if weight.kind.startswith("NV") else "mxfp4" if four else "mxfp8"
    return ClassReading(
        weight.dtype("orig_dtype"), (*stack, out, width), steps, values, scheme=f"{name}/{size}"
    )


CLASSES: Mapping[str, Callable[[FlattenedTensor], ClassReading]] = {
    "Float8Tensor": _by_block,
    "Int8Tensor": _by_block,
    "IntxUnpackedToInt8Tensor": _by_block,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiles,
    "MXTensor": _small,
    "NVFP4Tensor": _small,
}
"""The tensor classes that are decoded, by name."""
TORCHAO = SourceFormat(seen, decode)
