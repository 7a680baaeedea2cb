"""What formats of integer codes share: which schemes they hold, and a folder of safetensors with one piece a layer.

    w = (code - zero) * step        w = code * step + bottom

A fracbit scheme of the type `int:step` has these numbers as they are: nothing is rounded. Layers have the names of released
checkpoints, such as Mixtral's `block_sparse_moe.experts.0.w1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.export.exporter import Nearest, StoredModel, Written
from fracbit.checkpoint.export.float import decoded, source_dtype
from fracbit.checkpoint.export.pieces import Piece, Tensors, copied_piece, write_pieces
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.integers import STEP
from fracbit.checkpoint.output import Output
from fracbit.errors import FormatError
from fracbit.models.blocks import is_linear, is_transposed, shape_of
from fracbit.models.experts import SplitExperts
from fracbit.models.origin import released_names
from fracbit.numerics.bits import pack_bits, row_bytes
from fracbit.numerics.datatypes import fixed_type
from fracbit.numerics.packed import PackedTensor, zeros_of
from fracbit.records.grouped import some_of
from fracbit.records.progress import Progress
from fracbit.records.scheme import Offset, Scheme, scale_label

LAYER_BYTES = 512  # of names and places in the header of a file


@dataclass(frozen=True)
class IntegerForms:
    """The schemes of integers that a format holds.

    `blocks`: lengths of blocks along the input, "row" for whole rows, or "any" for every length; all must divide the width.
    `scales`: types of the steps. `columns` and `rows`: the numbers of outputs and inputs must be multiples of them. `inputs`:
    how these may be rounded while the model runs, "" for not at all.
    """

    bits: tuple[int, ...]
    offsets: tuple[Offset, ...]
    blocks: tuple[int | str, ...]
    scales: tuple[str, ...] = ("fp16", "bf16")
    embeddings: bool = False
    columns: int = 1
    rows: int = 1
    inputs: str = ""

    def nearest(self, layer: StoredLayer) -> Nearest:
        """The nearest form of a layer, with every reason why its own will not do."""
        refused = unexportable(layer, self.inputs)
        if refused is not None:
            return refused
        if layer.kind == "embedding" and not self.embeddings:
            return Nearest("float", "it is an embedding table, which the format keeps in floats")
        if layer.shape[0] % self.columns:
            return Nearest("float", f"its {layer.shape[0]} outputs are no multiple of {self.columns}")
        if layer.shape[1] % self.rows:
            return Nearest("float", f"its {layer.shape[1]} inputs are no multiple of {self.rows}")
        block = self._block(layer)
        if block is None:
            return Nearest("float", f"no block of the format divides its {layer.shape[1]} inputs")
        old, offset = layer.scheme, self._offset(layer.scheme.offset)
        least = 2 if offset == "none" else 1  # of 1 bit, a symmetric grid has one value
        widths = [bits for bits in self.bits if bits >= max(old.bits, least)]
        new = Scheme(
            STEP,
            min(widths) if widths else max(self.bits),
            block,
            offset=offset,
            scale=old.scale if old.scale in self.scales else self.scales[0],
        )
        return Nearest(new, ", ".join(reasons(layer, new)))

    @property
    def levels(self) -> tuple[Scheme, ...]:
        """Schemes near which a budget finds those that some layer may have."""
        symmetric_or_not: tuple[Offset, ...] = ("none", "zero")
        return tuple(
            Scheme(STEP, bits, block, offset=offset)
            for bits in (2, 3, 4, 5, 6, 8)
            for block in (32, 64, 128)
            for offset in symmetric_or_not
        )

    def with_scales(self, kind: str) -> IntegerForms:
        """The same with scales of this type alone."""
        return replace(self, scales=(kind,))

    def _block(self, layer: StoredLayer) -> int | str | None:
        """The longest block that is no longer than the layer's, else the shortest; None where none divides the inputs."""
        width, asked = layer.shape[1], layer.scheme.block
        longest = width if not isinstance(asked, int) else asked
        if "any" in self.blocks and isinstance(asked, int) and width % asked == 0:
            return asked
        fits: dict[int, int | str] = {}
        for block in (16, 32, 64, 128, 256, "row") if "any" in self.blocks else self.blocks:
            length = width if block == "row" else int(block)
            if width % length == 0 and (length not in fits or block == asked):
                fits[length] = block
        if not fits:
            return None
        shorter = [length for length in fits if length <= longest]
        return fits[max(shorter) if shorter else min(fits)]

    def _offset(self, asked: Offset) -> Offset:
        return asked if asked in self.offsets else self.offsets[-1]


def unexportable(layer: StoredLayer, inputs: str = "") -> Nearest | None:
    """Why nothing but fracbit runs a layer, whose `inputs` may be rounded in this way alone; None where others do."""
    if layer.rotated:
        return Nearest(
            None, "its inputs are rotated while the model runs; quantize without the transform rotate-mlp"
        )
    if layer.inputs is None or str(layer.inputs) == inputs:
        return None
    may = f"quantize with inputs {inputs} or none" if inputs else "quantize without inputs"
    return Nearest(None, f"its inputs are rounded to {layer.inputs} while the model runs; {may}")


def reasons(layer: StoredLayer, new: Scheme) -> list[str]:
    """Where a layer's own form differs from the one that the format holds."""
    old = layer.scheme
    differs = {
        f"its data type is {old.dtype}": old.dtype != new.dtype,
        f"it has {old.bits} bits": old.bits != new.bits,
        f"its blocks are {old.block} along {old.axis}": (old.block, old.axis) != (new.block, new.axis),
        f"its offset is {old.offset}": old.offset != new.offset,
        f"its scales are {scale_label(old.scale)}": old.scale != new.scale,
        f"{layer.outliers} of its columns have 16 bits": layer.outliers > 0,
    }
    return [what for what, wrong in differs.items() if wrong]


class HeldForms(Protocol):
    """The forms of layers that a format holds."""

    def nearest(self, layer: StoredLayer) -> Nearest:
        """The nearest form of a layer."""
        ...


@dataclass(frozen=True)
class CodedWeights:
    """A format whose layers are codes beside other tensors.

    `holds`: the schemes that it has; `tensors`: what a layer is stored as, by the ending of its name; `config`: what becomes of
    config.json; `refuses`: why a model cannot have the format whatever its layers, "" where it can. `fault`: why a layer cannot
    be stored that only its codes show, "" where it can; None where no codes need a look. `notes`: what programs make of it.
    """

    holds: HeldForms
    tensors: Callable[[StoredLayer, PackedTensor], dict[str, Tensor]]
    config: Callable[[StoredModel, ReleasedNames], dict[str, Any]]
    refuses: Callable[[PreTrainedModel], str] = lambda model: ""
    fault: Callable[[PackedTensor], str] | None = None
    notes: Callable[[StoredModel, ReleasedNames], tuple[str, ...]] = lambda stored, names: ()

    def check(self, model: PreTrainedModel, folder: Path) -> None:
        """See `Exporter`."""
        reason = joined_experts(model) or self.refuses(model)
        if reason:
            raise FormatError(reason)

    def nearest(self, layer: StoredLayer) -> Nearest:
        """See `Exporter`."""
        return self.holds.nearest(layer)

    def beside(self, model: PreTrainedModel, folder: Path) -> int:
        """See `Exporter`: a shape or an order of inputs, and longer names of tensors."""
        widths = [shape_of(module)[1] for module in model.modules() if is_linear(module)]
        return sum(LAYER_BYTES + 4 * width for width in widths)

    def size(self, stored: StoredModel) -> int:
        """See `Exporter`. Raises `FormatError`, before anything is written, where a config cannot say how layers are stored, or
        the format cannot hold the codes of some.
        """
        names = names_of(stored)
        self.config(stored, names)
        self._check_codes(stored)
        return sum(piece.bytes for piece in self._pieces(stored, names))

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """See `Exporter`."""
        names = names_of(stored)
        files = write_pieces(self._pieces(stored, names), target, show)
        return Written(files, self.config(stored, names), self.notes(stored, names))

    def _check_codes(self, stored: StoredModel) -> None:
        """Raise `FormatError` naming the layers whose codes the format cannot hold; one layer is in memory at a time."""
        faults: dict[str, list[str]] = {}
        for name in stored.layers if self.fault else ():
            assert self.fault is not None
            faults.setdefault(self.fault(stored.exported(name)[0]), []).append(name)
        faults.pop("", None)
        if faults:
            raise FormatError(". ".join(f"{some_of(names)}: {fault}" for fault, names in faults.items()))

    def _pieces(self, stored: StoredModel, names: ReleasedNames) -> list[Piece]:
        dtype = source_dtype(stored)
        codes = [self._piece(stored, name, names) for name in stored.layers]
        floats = [
            _float_piece(stored, name, names, dtype) for name in stored.disk if name not in stored.layers
        ]
        return [*codes, *floats, *(copied_piece(stored, name, names.tensor(name)) for name in stored.rest)]

    def _piece(self, stored: StoredModel, name: str, names: ReleasedNames) -> Piece:
        layer = stored.layers[name]

        def make() -> Tensors:
            packed, record = stored.exported(name)
            own = names.module(name)
            return {own + ending: tensor for ending, tensor in self.tensors(layer, packed).items()}, record

        return Piece(name, layer.bytes, make)


@dataclass(frozen=True, eq=False)
class ReleasedNames:
    """What released checkpoints call things: `tensors` by their names in the model, `layers` that are quantized, `floats`: the
    linears that are not.
    """

    tensors: Mapping[str, str]
    layers: Mapping[str, StoredLayer]
    floats: tuple[str, ...]

    def tensor(self, name: str) -> str:
        """The name in the files of a tensor."""
        return self.tensors.get(name, name)

    def module(self, layer: str) -> str:
        """The name in the files of a layer."""
        return self.tensor(f"{layer}.weight").removesuffix(".weight")


def names_of(stored: StoredModel) -> ReleasedNames:
    """How tensors are called in the files."""
    tensors = released_names(stored.model)
    floats = [
        tensors.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        for name, module in stored.model.named_modules()
        if is_linear(module) and name not in stored.layers
    ]
    named = ReleasedNames(tensors, {}, tuple(floats))
    return replace(named, layers={named.module(name): layer for name, layer in stored.layers.items()})


def joined_experts(model: PreTrainedModel) -> str:
    """Why experts cannot be named one by one, as in released checkpoints that hold those of a block in one tensor; else ""."""
    experts = experts_of(model)
    names = released_names(model) if experts else {}
    joined = [name for name in experts if f"{name}.weight" not in names]
    if not joined:
        return ""
    return (
        f"released checkpoints of {type(model).__name__} hold all experts of a block in one tensor, so that no program knows "
        f"{joined[0]} by itself; write float, or run the checkpoint with fracbit"
    )


def experts_of(model: nn.Module) -> list[str]:
    """The names of the experts' linears in a model whose mixtures are split."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for name, inner in module.named_modules()
        if is_linear(inner)
    ]


def _float_piece(stored: StoredModel, name: str, names: ReleasedNames, dtype: torch.dtype) -> Piece:
    """A layer that becomes floats, as its module stores them."""
    size = stored.disk[name].shape[0] * stored.disk[name].shape[1] * dtype.itemsize
    own = names.tensor(f"{name}.weight")
    linear = stored.disk[name].kind == "linear"
    transposed = linear and is_transposed(stored.model.get_submodule(name))

    def make() -> Tensors:
        weight = decoded(stored, name, dtype)  # [out, in]
        return {own: weight.T.contiguous() if transposed else weight}, None

    return Piece(name, size, make)


# --- what the formats make of a packed tensor -------------------------------------------------------------------------


def steps(packed: PackedTensor) -> Tensor:
    """The steps [out, blocks] in the type of the scales: exact."""
    assert isinstance(packed.scales, Tensor)
    return (packed.scales.float() * fixed_type(packed.scheme).unit).to(packed.scales.dtype)


def zero_codes(packed: PackedTensor) -> Tensor:
    """The code uint8 [out, blocks] that stands for 0: the zero point, or the middle of all codes."""
    assert isinstance(packed.scales, Tensor)
    if packed.scheme.offset == "zero":
        return zeros_of(packed, tuple(packed.scales.shape))
    return torch.full(packed.scales.shape, 2 ** (packed.scheme.bits - 1), dtype=torch.uint8)


def row_words(packed: PackedTensor) -> Tensor:
    """The codes as int32 [out, ceil(in b / 32)]: one stream of bits in each row, the least significant first."""
    return as_words(
        packed.codes.view(packed.shape[0], -1)[:, : row_bytes(packed.shape[1], packed.scheme.bits)]
    )


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, n] as int32 [rows, ceil(n b / 32)], in such streams."""
    return as_words(pack_bits(codes.contiguous(), bits))


def as_words(stream: Tensor) -> Tensor:
    """Bytes [rows, n] as int32 [rows, ceil(n / 4)], little-endian."""
    padded = nn.functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous()  # [rows, 4 words]
    return padded.view(-1).view(torch.int32).view(len(stream), -1)  # [rows, words]


def linears_by_scheme(names: ReleasedNames) -> dict[tuple[Scheme, str], list[str]]:
    """The layers' names by scheme and rounding of inputs, in the order of the model."""
    found: dict[tuple[Scheme, str], list[str]] = {}
    for name, layer in names.layers.items():
        found.setdefault((layer.scheme, str(layer.inputs or "")), []).append(name)
    return found
