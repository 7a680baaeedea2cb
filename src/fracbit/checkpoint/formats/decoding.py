"""How a float tensor is made of the tensors that lie on disk: codes, scales, zero points.

A decoding is a pure function of its parts. Rows of the result need only rows (or columns) of the parts, so that some rows
can be decoded alone, and a whole tensor piece by piece: memory holds the result, its parts and one piece of work.

    rows of the result -> whole steps of rows -> the indices of each part -> decode -> the rows asked for
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fracbit.checkpoint.formats.gguf_rows import StoredBlocks
    from fracbit.checkpoint.formats.integers import StoredIntegers
    from fracbit.checkpoint.source import TensorInfo

WORDS = ("I32", "U32")
NUMBERS = ("F16", "BF16", "F32", "F64")
POWERS = ("U8", "F8_E8M0")
INDICES = ("I32", "I64")
PIECE = 1 << 20  # weights that are decoded at a time


Decode = Callable[[Mapping[str, Tensor]], Tensor]
"""From the parts of a tensor, by their roles, to its values."""


@dataclass(frozen=True)
class Part:
    """A stored tensor by `name`. `rows` rows of the result are in `units` indices along `axis`; `rows` 0: in all of it.

    `kinds`: the types that it may have; empty: the format has checked it.
    """

    name: str
    rows: int = 0
    units: int = 1
    axis: int = 0
    kinds: tuple[str, ...] = ()

    def indices(self, rows: slice, size: int) -> slice:
        """The indices, of `size`, that hold these rows of the result, which begin at a whole step."""
        if not self.rows:
            return slice(0, size)
        return slice(rows.start // self.rows * self.units, min(size, -(-rows.stop * self.units // self.rows)))


@dataclass(frozen=True, eq=False)
class Decoding:
    """A decoded tensor: its type and shape, its parts by the names that `decode` knows, and `decode` itself.

    `decode` takes the parts of any whole number of steps of rows and gives these rows, in any float type. It may close over
    numbers, such as the width of a row, and never over the number of rows. `upright`: a linear's weight comes out as
    [out, in], whatever the layer of the model stores. `scheme`: how it is stored, in the words of fracbit or of its format.
    `codes`: the integers or blocks of the whole layer from its whole parts; None where it is not stored as such. `floats`: what
    is stored of other values of a tensor that is stored as floats, in its one part; None for codes.
    """

    info: TensorInfo
    parts: Mapping[str, Part]
    decode: Decode
    upright: bool = True
    scheme: str = ""
    codes: Callable[[Mapping[str, Tensor]], StoredIntegers | StoredBlocks] | None = None
    floats: Callable[[Tensor], Tensor] | None = None

    @property
    def step(self) -> int:
        """Rows that can be decoded alone, and any multiple of them; the whole tensor where no part can be cut."""
        steps = [part.rows for part in self.parts.values() if part.rows]
        return math.lcm(*steps) if steps else max(self.info.shape[0], 1)

    def widened(self, rows: slice) -> slice:
        """The whole steps that hold these rows."""
        step, total = self.step, self.info.shape[0]
        return slice(rows.start // step * step, min(total, -(-rows.stop // step) * step))

    def pieces(self) -> list[slice]:
        """All rows in whole steps, about `PIECE` weights each."""
        total, step = self.info.shape[0], self.step
        width = max(1, torch.Size(self.info.shape[1:]).numel())
        count = max(1, PIECE // (step * width)) * step
        return [slice(start, min(total, start + count)) for start in range(0, total, count)]


def cut(part: Part, tensor: Tensor, rows: slice) -> Tensor:
    """The indices of a part, which is whole, that hold these rows of the result; a view."""
    if not part.rows:
        return tensor
    found = part.indices(rows, tensor.shape[part.axis])
    return tensor.narrow(part.axis, found.start, found.stop - found.start)


def filled(decoding: Decoding, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The whole tensor from its whole parts, decoded piece by piece."""
    whole = torch.empty(decoding.info.shape, dtype=dtype)
    for rows in decoding.pieces():
        some = {role: cut(decoding.parts[role], tensor, rows) for role, tensor in parts.items()}
        whole[rows] = decoding.decode(some).to(dtype)
    return whole


def turned(decoding: Decoding, info: TensorInfo) -> Decoding:
    """The transpose of a decoded matrix, for layers that store theirs as [in, out]; it is decoded whole. `info`: its own."""
    parts = {role: Part(part.name) for role, part in decoding.parts.items()}
    return Decoding(
        info,
        parts,
        lambda tensors: decoding.decode(tensors).T,
        upright=False,
        scheme=decoding.scheme,
        codes=decoding.codes,
    )
