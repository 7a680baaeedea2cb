"""A layer of integers of a foreign checkpoint: read as a packed tensor, and written back as the tensors that hold it.

Only codes and scales are written; zero points, group indices and shapes stay as they lie on the disk. A layer that would not
come back bit by bit is refused before it is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.checkpoint.export.awq import export_awq
from fracbit.checkpoint.export.coded import CodedWeights
from fracbit.checkpoint.export.compressed_tensors import export_compressed_tensors
from fracbit.checkpoint.export.gptq import export_gptq
from fracbit.checkpoint.format import StoredLayer
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


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer that holds integers: `packed`, with its inputs in `order` int64 [in], and how its tensors are made of that.

    `names`: the tensors on the disk that hold codes and scales, by the endings of the format.
    """

    integers: StoredIntegers
    packed: PackedTensor
    names: Mapping[str, str]

    @property
    def order(self) -> Tensor:
        """The inputs of the layer, in the order of the packed columns."""
        return self.integers.order

    def stored(self, packed: PackedTensor) -> dict[str, Tensor]:
        """What is stored of `packed`, which has the schemes and zero points of this layer, by names on the disk."""
        now = unpacked_integers(self.integers, packed)
        codes = pack_bits(now.codes.contiguous(), now.bits)  # in stored order
        made = PACKERS[now.packer]().tensors(
            StoredLayer(packed.scheme, packed.shape), replace(packed, codes=codes)
        )
        return {name: made[ending].contiguous() for ending, name in self.names.items()}


def integer_layer(source: Source, weight: str) -> IntegerLayer:
    """The layer whose decoded tensor is called `weight`. Raises `FormatError` saying why where it cannot be written back."""
    decoding = source.decodings[weight]
    if decoding.integers is None:
        raise FormatError("its codes are no integers of GPTQ, AWQ or compressed-tensors (pack-quantized)")
    parts = {role: read_stored(source, part.name) for role, part in decoding.parts.items()}
    integers = decoding.integers(parts)
    names = {ending: decoding.parts[role].name for role, ending in integers.written.items()}
    layer = IntegerLayer(integers, packed_integers(integers), names)
    for name, tensor in layer.stored(layer.packed).items():
        held = read_stored(source, name)
        if held.shape != tensor.shape or not torch.equal(held, tensor):
            raise FormatError(f"{name} is packed in a way that is read and not written")
    return layer
