"""Numbers: data types, blocks, scales, bits, packed tensors. Torch tensors only; no model is known here."""

from fracbit.numerics.datatypes import DATATYPES, DataType, check_datatype, fixed_type
from fracbit.numerics.grid import Grid, encode
from fracbit.numerics.packed import PackedTensor, decode, from_parts, part_shapes, parts_of, stored_bits
from fracbit.numerics.ranges import fit, quantize_tensor

__all__ = [
    "DATATYPES", "DataType", "Grid", "PackedTensor", "check_datatype", "decode", "encode", "fit", "fixed_type",
    "from_parts", "part_shapes", "parts_of", "quantize_tensor", "stored_bits",
]  # fmt: skip
