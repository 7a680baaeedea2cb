"""`PackedTensor`: a quantized weight as the bytes that are stored, and `decode`, the one formula that reads them back.

    w[o, i] = scale[b] * T[o, code[o, i]] + shift[b]
    shift[b] = 0 | offset[b] | -scale[b] * T[zero[b]]            (offset none | float, mean | zero)

T is the table of the data type, b the block of the weight. Every quantizer of the project only chooses what these hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fracbit.errors import FormatError, RecipeError
from fracbit.numerics.bits import has_top_code, row_bytes, unpack_bits
from fracbit.numerics.datatypes import DataType, fixed_type, is_fitted, nearest_type, signed_scales
from fracbit.numerics.layout import CHUNK, scales_shape, spread, spread_rows
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """The stored form of a weight `[out, in]`; `quantized_width = in - len(columns)` input columns are quantized.

    - `codes` uint8 [out, ceil(quantized_width * bits / 8)]: row-major over output rows whatever the axis, dense, LSB first.
    - `scales` [out, blocks], [blocks, quantized_width] (axis out), [1, 1] (tensor) or [blocks] (flat), in the scale type;
      or a `PackedTensor` [1, n] when the scales are themselves quantized.
    - `offsets`: None; as `scales` (float, mean); or uint8 [rows of scales, ceil(columns * bits / 8)], packed zero codes.
    - `table`: fp16 [1 or out, 2^bits] of a fitted data type, None for a fixed one.
    - `columns` int32 [p] ascending and `outliers` [out, p] 16-bit: input columns that were not quantized.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | PackedTensor
    offsets: Tensor | PackedTensor | None = None
    table: Tensor | None = None
    columns: Tensor | None = None
    outliers: Tensor | None = None

    @property
    def quantized_width(self) -> int:
        """Input columns that are quantized."""
        return self.shape[1] - (0 if self.columns is None else len(self.columns))

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same bytes on another device."""
        parts = {name: getattr(self, name) for name in PARTS}
        moved: dict[str, Any] = {
            name: part if part is None else part.to(device) for name, part in parts.items()
        }
        return PackedTensor(self.scheme, self.shape, **moved)


PARTS = ("codes", "scales", "offsets", "table", "columns", "outliers")


def parts_of(packed: PackedTensor, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is stored, with its name; parts of quantized scales are `scales_codes`, `scales_scales`, ..."""
    for name in PARTS:
        part = getattr(packed, name)
        if isinstance(part, PackedTensor):
            yield from parts_of(part, f"{prefix}{name}_")
        elif part is not None:
            yield prefix + name, part


def from_parts(scheme: Scheme, shape: tuple[int, int], parts: dict[str, Tensor]) -> PackedTensor:
    """Inverse of `parts_of`; checks every shape and type. Raises `FormatError` naming the part that does not fit."""
    outliers = 0 if "columns" not in parts else len(parts["columns"])
    expected = part_shapes(scheme, shape, outliers)
    if set(expected) != set(parts):
        raise FormatError(f"scheme {scheme} stores {sorted(expected)}, got {sorted(parts)}")
    for name, (dtypes, size) in expected.items():
        if tuple(parts[name].shape) != size or parts[name].dtype not in dtypes:
            got = f"{parts[name].dtype} {tuple(parts[name].shape)}"
            raise FormatError(f"{name} of scheme {scheme} should be {dtypes[0]} {size}, got {got}")
    return _assemble(scheme, shape, parts, "")


PartShapes = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]
"""Name of a part -> (types it may have, its shape)."""


def part_shapes(scheme: Scheme, shape: tuple[int, int], outliers: int = 0) -> PartShapes:
    """What a packed tensor of this scheme stores: name -> (types allowed, shape). `outliers` counts 16-bit columns."""
    quantized = (shape[0], shape[1] - outliers)
    per_block = scales_shape(quantized, scheme)
    result: PartShapes = {"codes": ((torch.uint8,), (shape[0], row_bytes(quantized[1], scheme.bits)))}
    result |= _float_part("scales", scheme.scale, per_block)
    if scheme.offset in ("float", "mean"):
        result |= _float_part("offsets", scheme.scale, per_block)
    if scheme.offset == "zero":
        rows, columns = zeros_shape(per_block)
        result["offsets"] = ((torch.uint8,), (rows, row_bytes(columns, scheme.bits)))
    if is_fitted(scheme):
        rows = shape[0] if scheme.dtype.endswith(":row") else 1
        result["table"] = ((torch.float16,), (rows, 2**scheme.bits))
    if outliers:
        result["columns"] = ((torch.int32,), (outliers,))
        result["outliers"] = ((torch.bfloat16, torch.float16), (shape[0], outliers))
    return result


def check_values(packed: PackedTensor) -> None:
    """Refuse what no quantizer stores: a part that is not finite, a negative scale, a code without a value.

    Raises `FormatError` naming the part. Reads every code where the type has fewer than 2^bits values.
    """
    for name, part in parts_of(packed):
        if part.is_floating_point() and part.numel():
            low, high = (float(end) for end in part.aminmax())  # one pass; NaN where one is NaN
            if not math.isfinite(low) or not math.isfinite(high):
                raise FormatError(f"{name} holds a value that is not finite")
            if low < 0 and name == "scales" and not signed_scales(packed.scheme):
                raise FormatError("scales holds a negative value")
    if packed.scheme.scale == "e8m0" and bool((packed.scales == 255).any()):  # type: ignore[union-attr]
        raise FormatError("scales holds a value that is not finite")
    for each in (packed, packed.scales, packed.offsets):
        if isinstance(each, PackedTensor) and _has_unknown_code(each):
            raise FormatError(f"codes of scheme {each.scheme} holds one that stands for no value")
    if packed.columns is not None:
        columns = packed.columns
        rising = bool((columns[1:] > columns[:-1]).all())
        if not rising or int(columns[0]) < 0 or int(columns[-1]) >= packed.shape[1]:
            raise FormatError(f"columns are not ascending numbers below {packed.shape[1]}")


def _has_unknown_code(packed: PackedTensor) -> bool:
    """Whether a code lies beyond the table. Most tables lack at most the top code, which is found without unpacking."""
    bits, levels, width = packed.scheme.bits, table_of(packed).values.shape[1], packed.quantized_width
    if levels == 2**bits or not packed.codes.numel():
        return False
    runs = packed.codes.split(max(1, CHUNK // width))  # [rows, bytes] each
    if levels == 2**bits - 1:
        return any(has_top_code(run, bits, width) for run in runs)
    return any(int(unpack_bits(run, bits, width).max()) >= levels for run in runs)


def stored_bits(packed: PackedTensor) -> int:
    """Bits held: codes, scales, offsets, tables, outliers and padding, counted from the tensors and not from a formula."""
    return 8 * sum(part.numel() * part.element_size() for _, part in parts_of(packed))


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The decoded weight [out, in], computed in fp32 and rounded once to `dtype`."""
    quantized = packed.codes.new_empty(
        (packed.shape[0], packed.quantized_width), dtype=dtype
    )  # [out, quantized]
    for first, part in decoded_parts(packed):
        quantized[first : first + len(part)] = part
    return quantized if packed.columns is None else _with_outliers(packed, quantized)


def decode_rows(packed: PackedTensor, rows: Tensor) -> Tensor:
    """Rows `rows` [n] of the weight, fp32 [n, in]; nothing else is decoded."""
    quantized = (packed.shape[0], packed.quantized_width)
    scale, shift = dense_scales(packed)
    codes = unpack_bits(packed.codes[rows], packed.scheme.bits, packed.quantized_width)  # [n, quantized]
    table = table_of(packed)
    if table.values.shape[0] > 1:  # a table for each row of the weight
        table = nearest_type(table.values[rows])
    values = table.look_up(codes) * spread_rows(scale, quantized, packed.scheme, rows)  # [n, quantized]
    if shift is not None:
        values = values + spread_rows(shift, quantized, packed.scheme, rows)  # [n, quantized]
    if packed.columns is None or packed.outliers is None:
        return values
    full = values.new_empty(len(rows), packed.shape[1])  # [n, in]
    full[:, quantized_columns(packed.columns, packed.shape[1])] = values
    full[:, packed.columns.long()] = packed.outliers[rows].float()
    return full


def decoded_parts(packed: PackedTensor) -> Iterator[tuple[int, Tensor]]:
    """The quantized columns in runs of rows, fp32: (first row, [rows, quantized_width]); never more than a run in memory."""
    quantized = (packed.shape[0], packed.quantized_width)
    scale, shift = dense_scales(packed)
    table = table_of(packed)
    step = max(1, CHUNK // max(1, packed.quantized_width))
    for first in range(0, packed.shape[0], step):
        last = min(first + step, packed.shape[0])
        codes = unpack_bits(packed.codes[first:last], packed.scheme.bits, quantized[1])  # [rows, quantized]
        part = table.rows(first, last).look_up(codes)  # [rows, quantized]
        part *= spread(scale, quantized, packed.scheme, first=first, last=last)
        if shift is not None:
            part += spread(shift, quantized, packed.scheme, first=first, last=last)
        yield first, part


def dense_scales(packed: PackedTensor) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of every block, fp32, in the shape of `scales_shape`; the shift is None for offset `none`."""
    per_block = scales_shape((packed.shape[0], packed.quantized_width), packed.scheme)
    scale = _dense(packed.scales, per_block)
    if packed.offsets is None:
        return scale, None
    if packed.scheme.offset != "zero":
        return scale, _dense(packed.offsets, per_block)
    return scale, -scale * table_of(packed).look_up(zeros_of(packed, per_block))


def zeros_of(packed: PackedTensor, per_block: tuple[int, ...]) -> Tensor:
    """The zero codes uint8 of offset `zero`, in the shape `per_block` of the scales."""
    assert isinstance(packed.offsets, Tensor)
    return unpack_bits(packed.offsets, packed.scheme.bits, zeros_shape(per_block)[1]).view(per_block)


def table_of(packed: PackedTensor) -> DataType:
    """The data type's table on the device of the codes: fixed, or the fitted one that is stored."""
    if packed.table is None:
        return fixed_type(packed.scheme).to(packed.codes.device)
    return nearest_type(packed.table.float())


def zeros_shape(per_block: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns in which zero codes are packed: those of the scales; flat blocks are one row."""
    return (per_block[0], per_block[1]) if len(per_block) == 2 else (1, per_block[0])


def _float_part(name: str, scale: str | Scheme, per_block: tuple[int, ...]) -> PartShapes:
    if isinstance(scale, str):
        return {name: ((SCALE_DTYPES[scale],), per_block)}
    count = math.prod(per_block)
    return {f"{name}_{part}": what for part, what in part_shapes(scale, (1, count)).items()}


SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "e8m0": torch.uint8}
"""What scales are stored as; those of e8m0 are exponents e, for 2^(e - 127)."""


def scale_values(stored: Tensor) -> Tensor:
    """Stored scales or offsets in fp32; bytes are exponents of 2 with a bias of 127 (E8M0)."""
    return stored.view(torch.float8_e8m0fnu).float() if stored.dtype == torch.uint8 else stored.float()


def _assemble(scheme: Scheme, shape: tuple[int, int], parts: dict[str, Tensor], prefix: str) -> PackedTensor:
    def part(name: str) -> Tensor | PackedTensor | None:
        if prefix + name in parts:
            return parts[prefix + name]
        if f"{prefix}{name}_codes" not in parts or isinstance(scheme.scale, str):
            return None
        outliers = len(parts[prefix + "columns"]) if prefix + "columns" in parts else 0
        count = math.prod(scales_shape((shape[0], shape[1] - outliers), scheme))
        return _assemble(scheme.scale, (1, count), parts, f"{prefix}{name}_")

    return PackedTensor(scheme, shape, **{name: part(name) for name in PARTS})  # type: ignore[arg-type]


def _dense(values: Tensor | PackedTensor, shape: tuple[int, ...]) -> Tensor:
    """Scales or offsets as stored, in fp32."""
    return (decode(values) if isinstance(values, PackedTensor) else scale_values(values)).view(shape)


def _with_outliers(packed: PackedTensor, quantized: Tensor) -> Tensor:
    """The weight [out, in] of its quantized columns [out, quantized] and its outliers."""
    assert packed.columns is not None
    assert packed.outliers is not None
    weight = quantized.new_empty(packed.shape)  # [out, in]
    weight[:, quantized_columns(packed.columns, packed.shape[1])] = quantized
    weight[:, packed.columns.long()] = packed.outliers.to(quantized.dtype)
    return weight


def rows_apart(shape: tuple[int, int], scheme: Scheme) -> int:
    """The fewest rows, above 0, that are stored without anything that other rows share; all of them where there are none."""
    inside = isinstance(scheme.block, int) or scheme.block == "row"
    own_table = scheme.dtype.endswith(":row") or not is_fitted(scheme)
    if scheme.axis != "in" or not inside or not own_table:
        return shape[0]
    if isinstance(scheme.scale, str):
        return 1
    scales = scheme.scale
    if (
        not isinstance(scales.block, int)
        or not isinstance(scales.scale, str)
        or is_fitted(scales)
        or scales.offset == "zero"
    ):
        return shape[0]
    # Scales are one row of codes: no block of them may cross, nor a byte.
    whole, blocks = math.lcm(scales.block, 8), scales_shape(shape, scheme)[1]
    return min(whole // math.gcd(whole, blocks), shape[0])


def join_rows(parts: Iterable[PackedTensor], rows: int) -> PackedTensor:
    """Runs that lie apart (`rows_apart`) of a weight of so many `rows`, without 16-bit columns, as one packed tensor.

    Codes are copied as the runs come, so that no more than one run is in memory twice.
    """
    some: list[PackedTensor] = []
    codes, done = torch.empty(0), 0
    for part in parts:
        if part.shape[0] == rows:
            return part
        if not done:
            codes = part.codes.new_empty((rows, part.codes.shape[1]))  # [out, bytes]
        codes[done : done + part.shape[0]] = part.codes
        done += part.shape[0]
        some.append(replace(part, codes=part.codes[:0]))
    tables = [part.table for part in some if part.table is not None]
    return replace(
        some[0],
        shape=(rows, some[0].shape[1]),
        codes=codes,
        scales=_joined([part.scales for part in some]),
        offsets=_joined([part.offsets for part in some]),
        table=torch.cat(tables) if tables else None,  # [out, levels]
    )


def _joined(parts: Sequence[Tensor | PackedTensor | None]) -> Any:
    """Scales or offsets of runs of rows; quantized ones [1, blocks] follow each other."""
    first = parts[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else torch.cat([part for part in parts if isinstance(part, Tensor)])
    some = [part for part in parts if isinstance(part, PackedTensor)]
    along = {name: [getattr(part, name) for part in some] for name in ("codes", "scales", "offsets")}
    joined: dict[str, Any] = {
        name: None if each[0] is None else torch.cat(each, 1) for name, each in along.items()
    }
    return replace(first, shape=(1, sum(part.shape[1] for part in some)), **joined)


def quantized_columns(columns: Tensor, count: int) -> Tensor:
    """The input columns, ascending, that are not among the outlier `columns`."""
    mask = torch.ones(count, dtype=torch.bool, device=columns.device)  # [in]
    mask[columns.long()] = False
    return mask.nonzero().squeeze(1)  # [quantized]


def outlier_count(inputs: int, share: float) -> int:
    """How many of `inputs` columns a share keeps in 16 bits: at least one, never all. Raises `RecipeError` outside (0, 1)."""
    if not 0 < share < 1:
        raise RecipeError(f"the share of 16-bit columns must lie between 0 and 1, got {share}")
    return min(max(1, round(inputs * share)), inputs - 1)
