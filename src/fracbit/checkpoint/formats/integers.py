"""The integers of a quantized layer, as GPTQ, AWQ and compressed-tensors store them, and the same as a packed tensor.

    w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],   g = groups[i]

Both directions are exact: the data type `int:step` has these numbers as they are (export/coded.py). Inputs whose groups are not
in order (GPTQ's act-order) are sorted by group on the way in and put back on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.errors import FormatError
from fracbit.numerics.bits import pack_bits
from fracbit.numerics.datatypes import fixed_type
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import SCALE_DTYPES, PackedTensor
from fracbit.records.scheme import Scheme

STEP = "int:step"
_SCALES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class StoredIntegers:
    """A layer of integers of `bits` bits.

    - `codes` uint8 [out, in]; `scale` [out, groups] in the type that is stored; `zero` uint8 [out, groups], None for the middle
      of all codes; `groups` int64 [in]: the group of every input.
    - `packer`: the export format that packs them; `written`: its endings of codes and of scales, by the roles of the parts that
      hold them here. Nothing else of the layer depends on codes and scales.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    groups: Tensor
    packer: str
    written: dict[str, str]

    @property
    def values(self) -> Tensor:
        """The weight fp32 [out, in] that they stand for."""
        zero = 2 ** (self.bits - 1) if self.zero is None else self.zero.int()[:, self.groups]
        return (self.codes.int() - zero) * self.scale.float()[:, self.groups]  # [out, in]

    @property
    def order(self) -> Tensor:
        """The inputs int64 [in] by group."""
        return self.groups.argsort(stable=True)


def packed_integers(integers: StoredIntegers) -> PackedTensor:
    """The layer as a packed tensor, its inputs by group. Raises `FormatError` for what no scheme has."""
    out, width = integers.codes.shape
    order, groups = integers.order, integers.scale.shape[1]
    length = width if groups == 1 else int((integers.groups == 0).sum())
    wanted = torch.arange(width) // max(length, 1)  # [in]
    if not torch.equal(integers.groups[order], wanted):
        raise FormatError("its groups have different numbers of inputs")
    zero = integers.zero
    if zero is not None and bool((zero == 2 ** (integers.bits - 1)).all()):
        zero = None  # symmetric integers, whose scales may have a sign
    sizes = integers.scale.abs() if zero is None else integers.scale  # [out, groups]
    if integers.scale.dtype not in _SCALES or not bool((sizes > 0).all()):
        raise FormatError("it has scales that are no floats, or 0, or below 0 beside zero points")
    offset, kind = "none" if zero is None else "zero", _SCALES[integers.scale.dtype]
    scheme = Scheme(STEP, integers.bits, "row" if groups == 1 else length, offset=offset, scale=kind)  # type: ignore[arg-type]
    scales = (integers.scale.float() / fixed_type(scheme).unit).to(integers.scale.dtype)  # [out, groups]
    packed = PackedTensor(
        scheme,
        (out, width),
        pack_bits(integers.codes[:, order].contiguous(), integers.bits),
        scales,
        offsets=None if zero is None else pack_bits(zero.contiguous(), integers.bits),
    )
    if not torch.equal(unpacked_integers(integers, packed).scale, integers.scale):
        raise FormatError(f"its scales do not fit {kind} as steps")
    return packed


def unpacked_integers(like: StoredIntegers, packed: PackedTensor) -> StoredIntegers:
    """The integers of a packed tensor that `packed_integers` made of `like`, moved since or not."""
    assert isinstance(packed.scales, Tensor)
    codes = torch.empty_like(like.codes)
    codes[:, like.order] = codes_in(packed)  # [out, in]
    scale = (packed.scales.float() * fixed_type(packed.scheme).unit).to(packed.scales.dtype)  # [out, groups]
    return replace(like, codes=codes, scale=scale)
