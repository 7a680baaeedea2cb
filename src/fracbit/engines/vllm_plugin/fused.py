"""What a layer of vLLM is made of: the linears of the checkpoint that vLLM fuses into one, and the product of all of them.

vLLM holds q, k and v as one matrix, and gate and up as another. A fracbit checkpoint stores them apart, each with a scheme of
its own, or float. Here they stay apart: `FusedLayer` says where each lies among the outputs of the layer, and `Product`
multiplies by one after another and joins what comes out. So the pieces need nothing in common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.checkpoint.format import StoredLayer, packed_layer, tensor_name
from fracbit.engines.vllm_plugin.ops import round_inputs
from fracbit.errors import FormatError
from fracbit.kernels import PackedLinear
from fracbit.numerics.packed import PackedTensor, check_values, part_shapes
from fracbit.transforms.rotation import turn_factors, turn_inputs

Shard = str | int | tuple[int, ...] | None
"""How vLLM says which part of a fused layer a tensor is: `"q"`, a number, several numbers, or None for a layer of one piece."""
_LETTERS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class FusedPiece:
    """A linear of the checkpoint: its name, how it is stored (None: float), its first output in the layer, and how many."""

    name: str
    stored: StoredLayer | None
    first: int
    rows: int


@dataclass(frozen=True)
class FusedLayer:
    """The pieces of a layer [out, `columns`] in the order of their outputs; `parts`: sizes of what vLLM calls shards."""

    pieces: tuple[FusedPiece, ...]
    parts: tuple[int, ...]
    columns: int

    def piece(self, shard: Shard = None) -> FusedPiece:
        """The piece that begins where `shard` does. Raises `FormatError` when none does."""
        number = _LETTERS.get(shard, -1) if isinstance(shard, str) else shard
        number = number[0] if isinstance(number, tuple) else number or 0
        first = sum(self.parts[:number])
        found = [piece for piece in self.pieces if piece.first == first]
        if len(found) != 1 or (shard is None and len(self.pieces) > 1) or not 0 <= number < len(self.parts):
            raise FormatError(
                f"{_names(self.pieces)}: vLLM brings shard {shard!r}, which is none of them; "
                "this version of vLLM loads the model in a way that fracbit does not know"
            )
        return found[0]


def piece_names(prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names in a checkpoint of what vLLM calls `prefix`; `fused`: last part of the name -> those of the pieces."""
    path, dot, last = prefix.rpartition(".")
    return tuple(f"{path}{dot}{name}" for name in fused.get(last, [last]))


def fused_layer(
    names: Sequence[str], layers: Mapping[str, StoredLayer], parts: Sequence[int], columns: int
) -> FusedLayer:
    """Where the linears `names` lie in a layer of `sum(parts)` outputs and `columns` inputs.

    `layers` are those of the config. The size of a float one is that of its part, or what the others leave.
    Raises `FormatError` when they do not fill the layer.
    """
    stored = [layers.get(name) for name in names]
    rows = [layer.shape[0] if layer else 0 for layer in stored]
    if len(names) == len(parts):
        rows = [size or part for size, part in zip(rows, parts, strict=True)]
    elif rows.count(0) == 1:
        rows[rows.index(0)] = sum(parts) - sum(rows)
    firsts = [sum(rows[:number]) for number in range(len(rows))]
    fits = all(layer is None or layer.shape[1] == columns for layer in stored)
    if not fits or min(rows) < 1 or sum(rows) != sum(parts):
        shapes = ", ".join(
            f"{name} {layer.shape if layer else 'float'}" for name, layer in zip(names, stored, strict=True)
        )
        raise FormatError(
            f"the checkpoint holds {shapes}, and the layer of vLLM that is made of them has {sum(parts)} outputs and {columns} "
            "inputs; config.json does not belong to this checkpoint, or vLLM pads the layer, which fracbit does not"
        )
    pieces = map(FusedPiece, names, stored, firsts, rows)
    return FusedLayer(tuple(pieces), tuple(parts), columns)


def leaves_of(pieces: Sequence[FusedPiece], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors that the pieces are stored as: last part of their names -> type. `dtype`: that of the float ones."""
    found: dict[str, torch.dtype] = {}
    for piece in pieces:
        if piece.stored is None:
            found.setdefault("weight", dtype)
            continue
        parts = part_shapes(piece.stored.scheme, piece.stored.shape, piece.stored.outliers)
        found |= {tensor_name("", part).removeprefix("."): dtypes[0] for part, (dtypes, _) in parts.items()}
    return found


@dataclass(frozen=True, eq=False)
class View:
    """What some pieces see of the layer's input: turned by the Hadamard matrix of `turn`, then rounded.

    `inputs`: how it is rounded, an `Inputs` in JSON; empty for not at all.
    """

    turn: tuple[Tensor, ...] | None
    inputs: str

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] as these pieces see it."""
        seen = x if self.turn is None else turn_inputs(x, self.turn)
        if not self.inputs:
            return seen
        rounded: Tensor = round_inputs(seen, self.inputs)
        return rounded


@dataclass(frozen=True, eq=False)
class Product:
    """`y = x W^T` of a layer whose rows of W are stored in pieces: packed ones, and float ones [rows, in].

    `seen`: for every piece, which of the `views` it multiplies.
    """

    pieces: tuple[PackedLinear | Tensor, ...]
    views: tuple[View, ...]
    seen: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out] in the type of `x`."""
        inputs = [view(x) for view in self.views]
        found = [_multiply(inputs[view], piece) for piece, view in zip(self.pieces, self.seen, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)  # [..., out]


def _multiply(x: Tensor, piece: PackedLinear | Tensor) -> Tensor:
    return torch.nn.functional.linear(x, piece) if isinstance(piece, Tensor) else piece(x)


def packed_piece(piece: FusedPiece, tensors: Mapping[str, Tensor]) -> PackedTensor:
    """The packed weight of a piece from its tensors by name. Raises `FormatError` naming what is missing or broken."""
    assert piece.stored is not None
    packed = packed_layer(piece.name, piece.stored, tensors)
    try:
        check_values(packed)
    except FormatError as error:
        raise FormatError(f"layer {piece.name}: {error}; copy or fetch the checkpoint again") from None
    return packed


def product_of(pieces: Sequence[FusedPiece], tensors: Mapping[str, Tensor]) -> Product:
    """The product of the pieces of a layer, from their tensors by name, on the device where these are.

    Raises `FormatError` when a tensor is missing or does not fit, `KernelError` when no kernel takes it.
    """
    kinds = list(dict.fromkeys(_kind(piece) for piece in pieces))
    weights = [_weight(piece, tensors) for piece in pieces]
    device = next(iter(tensors.values())).device
    views = [View(turn_factors(width, device) if width else None, inputs) for width, inputs in kinds]
    return Product(tuple(weights), tuple(views), tuple(kinds.index(_kind(piece)) for piece in pieces))


def _kind(piece: FusedPiece) -> tuple[int, str]:
    """The width of the rotation of a piece's inputs, 0 for none, and their rounding in JSON, empty for none."""
    stored = piece.stored
    if stored is None:
        return 0, ""
    rounding = "" if stored.inputs is None else json.dumps(stored.inputs.to_json())
    return stored.shape[1] if stored.rotated else 0, rounding


def _weight(piece: FusedPiece, tensors: Mapping[str, Tensor]) -> PackedLinear | Tensor:
    if piece.stored is not None:
        return PackedLinear(packed_piece(piece, tensors))
    name = tensor_name(piece.name, "codes")
    if name not in tensors:
        raise FormatError(f"layer {piece.name}: the checkpoint holds no tensor {name!r}")
    if len(tensors[name]) != piece.rows:
        raise FormatError(
            f"layer {piece.name}: {name} has {len(tensors[name])} rows, and the layer needs {piece.rows}"
        )
    return tensors[name]


def _names(pieces: Sequence[FusedPiece]) -> str:
    return ", ".join(piece.name for piece in pieces)
