"""A layer of codes of a foreign checkpoint: read as a packed tensor, and written back as the tensors that hold it.

Only codes and scales are written, in blocks of llama.cpp also bottoms; zero points, group indices and shapes stay as they are.
A layer that would not come back with the same values is refused before it is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.checkpoint.export.awq import export_awq
from fracbit.checkpoint.export.coded import CodedWeights
from fracbit.checkpoint.export.compressed_tensors import export_compressed_tensors
from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES
from fracbit.checkpoint.export.gptq import export_gptq
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.decoding import Decoding
from fracbit.checkpoint.formats.gguf_rows import StoredBlocks
from fracbit.checkpoint.formats.integers import StoredIntegers, packed_integers, unpacked_integers
from fracbit.checkpoint.source import Source, read_stored
from fracbit.errors import FormatError
from fracbit.numerics.bits import pack_bits
from fracbit.numerics.packed import PackedTensor

PACKERS: Mapping[str, Callable[[], CodedWeights]] = {
    "gptq": export_gptq,
    "awq": export_awq,
    "compressed-tensors": export_compressed_tensors,
}
"""What packs integers, by the format that they are stored in."""


@dataclass(frozen=True, eq=False)
class MovableLayer:
    """A layer whose codes can be moved: `packed`, with its inputs in `order` int64 [in].

    `stored`: what another packed tensor of the same scheme and zero points is on the disk, by names there. The layer's weights
    are those of `packed` times `factor`.
    """

    packed: PackedTensor
    order: Tensor
    stored: Callable[[PackedTensor], dict[str, Tensor]]
    factor: float = 1.0


def movable_layer(source: Source, weight: str) -> MovableLayer:
    """The layer whose decoded tensor is called `weight`. Raises `FormatError` saying why where it cannot be written back."""
    decoding = source.decodings[weight]
    if decoding.codes is None:
        raise FormatError("its codes are none that can be moved")
    parts = {role: read_stored(source, part.name) for role, part in decoding.parts.items()}
    found = decoding.codes(parts)
    layer = _blocks(decoding, found) if isinstance(found, StoredBlocks) else _integers(decoding, found)
    again = layer.stored(layer.packed)
    held = {role: again.get(part.name, parts[role]) for role, part in decoding.parts.items()}
    same = all(held[role].shape == parts[role].shape for role in parts)
    if not same or not torch.equal(decoding.decode(held), decoding.decode(parts)):
        raise FormatError("it is packed in a way that is read and not written")
    return layer


def _integers(decoding: Decoding, found: StoredIntegers) -> MovableLayer:
    """A layer of GPTQ, AWQ or compressed-tensors."""
    names = {ending: decoding.parts[role].name for role, ending in found.written.items()}

    def stored(packed: PackedTensor) -> dict[str, Tensor]:
        now = unpacked_integers(found, packed)
        codes = pack_bits(now.codes.contiguous(), now.bits)  # in stored order
        made = PACKERS[now.packer]().tensors(
            StoredLayer(packed.scheme, packed.shape), replace(packed, codes=codes)
        )
        return {name: made[ending].contiguous() for ending, name in names.items()}

    return MovableLayer(packed_integers(found), found.order, stored)


def _blocks(decoding: Decoding, found: StoredBlocks) -> MovableLayer:
    """A layer of a GGUF file."""
    if found.kind not in BLOCK_TYPES:
        raise FormatError(f"blocks of {found.kind} are read and not written")
    kind, names = BLOCK_TYPES[found.kind], {role: part.name for role, part in decoding.parts.items()}
    packed = kind.packed(found.change.rows_back(found.rows))

    def stored(packed: PackedTensor) -> dict[str, Tensor]:
        if kind.factor is not None and float(kind.factor(packed)) != 1:
            raise FormatError(f"its steps are no longer numbers of {found.kind}")
        return {names["blocks"]: found.change.rows(kind.rows(packed))}

    return MovableLayer(packed, torch.arange(packed.shape[1]), stored, found.factor)
