"""The small floats of GPUs in files: E2M1 and E4M3 codes, with scales that are powers of 2, E4M3 numbers, or floats.

    mxfp4  ocp4/32 s=e8m0          E2M1, two in a byte      uint8 [out, in / 32]: e, for 2^(e - 127)
    nvfp4  ocp4/16 s=ocp8:tensor   E2M1, two in a byte      E4M3 [out, in / 16], and one float for all
    mxfp8  ocp8/32 s=e8m0          E4M3                     uint8 [out, in / 32]
    fp8    ocp8/row, ocp8/tensor   E4M3                     floats [out, 1] or [1, 1]
    fp8    ocp8/128x128            E4M3                     floats [out / 128, in / 128]

Codes count up from the least value; in the files they are a sign and a magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fracbit.checkpoint.export.coded import IntegerForms, reasons, unexportable
from fracbit.checkpoint.export.exporter import Nearest
from fracbit.checkpoint.format import StoredLayer
from fracbit.errors import FormatError
from fracbit.numerics.bits import pack_bits
from fracbit.numerics.datatypes import fixed_type, scale_unit
from fracbit.numerics.grid import codes_in
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme, patch_block

MXFP4 = Scheme("ocp", 4, 32, scale="e8m0")
NVFP4 = Scheme("ocp", 4, 16, scale="ocp8:tensor")
MXFP8 = Scheme("ocp", 8, 32, scale="e8m0")
FP8 = {
    Scheme("ocp", 8, block, scale=scale): inputs
    for block, inputs in (("row", "ocp8/token"), ("tensor", "ocp8/token"), ("128x128", "ocp8/128"))
    for scale in ("bf16", "fp16", "fp32")
}
"""Every scheme of FP8, and how the inputs of such a layer may be rounded while the model runs."""
BIAS = 127  # of an exponent of 8 bits


@dataclass(frozen=True)
class FloatForms:
    """The `schemes` of small floats that a format holds; `inputs`: how those of some may be rounded while the model runs."""

    schemes: tuple[Scheme, ...]
    inputs: Mapping[Scheme, str] = field(default_factory=dict)
    embeddings: bool = False

    def nearest(self, layer: StoredLayer) -> Nearest:
        """A layer's own form, or the nearest in bits, then in the length of its blocks."""
        asked = layer.scheme
        refused = unexportable(layer, self.inputs.get(asked, ""))
        if refused is not None:
            return refused
        if layer.kind == "embedding" and not self.embeddings:
            return Nearest("float", "it is an embedding table, which the format keeps in floats")
        width = layer.shape[1]
        fits = [each for each in self.schemes if _fits(each, layer.shape)]
        if not fits:
            return Nearest("float", f"no block of the format divides its {width} inputs")

        def length(each: Scheme) -> int:
            along = (patch_block(each.block) or (1, each.block))[1]
            return along if isinstance(along, int) else width

        def distance(each: Scheme) -> tuple[bool, int, int]:
            return each.bits < asked.bits, abs(each.bits - asked.bits), abs(length(each) - length(asked))

        new = asked if asked in fits else min(fits, key=distance)
        if layer.inputs is not None and self.inputs.get(new, "") != str(layer.inputs):
            return Nearest(
                None, f"blocks of {asked.block} do not cover it, and only they go with inputs {layer.inputs}"
            )
        return Nearest(new, ", ".join(reasons(layer, new)))


def _fits(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether whole blocks cover a weight of this shape [out, in]."""
    rows, columns = patch_block(scheme.block) or (1, scheme.block)
    return shape[0] % rows == 0 and (not isinstance(columns, int) or shape[1] % columns == 0)


@dataclass(frozen=True)
class EitherForms:
    """Integers, and small floats for the layers that have some."""

    integers: IntegerForms
    floats: FloatForms

    @property
    def embeddings(self) -> bool:
        """Whether embedding tables may be quantized."""
        return self.integers.embeddings

    @property
    def levels(self) -> tuple[Scheme, ...]:
        """Those of the integers, which lose less at equal bits."""
        return self.integers.levels

    def nearest(self, layer: StoredLayer) -> Nearest:
        """The nearest form of a layer that is of its kind."""
        return (self.floats if is_small_float(layer.scheme) else self.integers).nearest(layer)

    def with_scales(self, kind: str) -> EitherForms:
        """The same, with scales of this type alone beside integers."""
        return replace(self, integers=self.integers.with_scales(kind))


def is_small_float(scheme: Scheme) -> bool:
    """Whether the codes of a scheme are small floats."""
    return scheme.dtype.partition(":")[0] == "ocp"


def float_codes(packed: PackedTensor) -> Tensor:
    """The codes uint8 [out, in] as a sign, the top bit, and a magnitude."""
    return _signed(codes_in(packed), packed.scheme)


def in_pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits uint8 [out, in], two in a byte, the first in the low half: [out, in / 2]."""
    return pack_bits(codes, 4)


def exponents(packed: PackedTensor) -> Tensor:
    """The steps of scales that are powers of 2, uint8 [out, blocks]: e, for 2^(e - 127)."""
    assert isinstance(packed.scales, Tensor)
    down = round(-torch.tensor(scale_unit(packed.scheme)).log2().item())
    return packed.scales - down  # [out, blocks]


def small_steps(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """Steps that are E4M3 numbers, float8 [out, blocks], and what they are multiplied by, fp32 [1]: exact."""
    stored = packed.scales
    assert isinstance(stored, PackedTensor)
    codes = _signed(codes_in(stored), stored.scheme).view(packed.shape[0], -1)  # [out, blocks]
    factor = torch.ldexp(torch.ones(1), exponents(stored).view(1).int() - BIAS)  # [1]
    return codes.view(torch.float8_e4m3fn), factor * scale_unit(packed.scheme)


def counted(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes uint8 that are a sign and a magnitude as they count from the least value up. Raises `FormatError` for a NaN."""
    middle = fixed_type(scheme).levels // 2  # the code of 0, whatever its sign
    magnitude = (codes & (2 ** (scheme.bits - 1) - 1)).int()
    if int(magnitude.max()) > middle:
        raise FormatError("it has scales or codes that are no numbers")
    return torch.where(codes >> (scheme.bits - 1) > 0, middle - magnitude, middle + magnitude).to(torch.uint8)


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes from the least value up as a sign and a magnitude of `bits` bits."""
    middle = fixed_type(scheme).levels // 2  # the code of 0
    above = codes.int() - middle
    return (above.abs() | (above < 0).int() << (scheme.bits - 1)).to(torch.uint8)
