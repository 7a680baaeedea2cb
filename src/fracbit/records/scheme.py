"""`Scheme`: how one weight matrix is stored. Strings and integers only; hashable, JSON, torch-free.

A scheme is a point in the space that the five papers span: a data type (2212.09720, 2403.06408), its bits, the block of
weights that share a scale (2212.09720), the axis a block runs along (2309.15531), what is stored per block besides the scale
(a zero point, a shift, a mean) and how the scales themselves are stored (double quantization).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from fracbit.errors import SchemeError, check_choice, near_matches
from fracbit.records.borrowed import as_written_here, meant, scheme_hint

Axis = Literal["in", "out"]
Offset = Literal["none", "zero", "float", "mean"]
FLOAT_SCALES = ("fp32", "fp16", "bf16", "e8m0")
_NAMED_BLOCKS = ("row", "tensor")
_FLAT = re.compile(r"flat:([1-9]\d*)")
_PATCH = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_SCALE_SHORTHAND = re.compile(r"([a-z]+(?::[a-z]+)?)([1-8]):([1-9]\d*|tensor)")
_SCALES_OF_SCALES = {"int:up": "fp16", "int:step": "fp16", "ocp": "e8m0"}
"""Types of engines, whose scales have no offset, and what their own scales are."""
_DTYPE = re.compile(r"[a-z]+(:[A-Za-z0-9./]+)?")
_OFFSETS = {"": "none", "z": "zero", "f": "float", "m": "mean"}
_WORD = re.compile(
    r"(?P<dtype>[a-z]+(:[A-Za-z0-9./]+?)?)(?P<bits>\d)(?P<offset>[zfm]?)([/:](?P<block>row|tensor|flat:\d+|\d+x\d+|\d+))?"
    r"(?P<axis> out)?( s=(?P<scale>[a-z0-9:]+))?"
)


@dataclass(frozen=True)
class Scheme:
    """How a weight `[out, in]` is stored.

    - `dtype`: data type, `"name"` or `"name:parameter"` (`"int"`, `"float:e3m0"`, `"power:1/2"`, `"kmeans:row"`).
    - `bits`: bits per code, 1..8.
    - `block`: weights that share a scale: a number, `"row"` (the whole line along `axis`), `"tensor"`, `"flat:64"` (64
      consecutive weights of the row-major tensor, crossing rows; the blocks of 2212.09720), or `"128x128"`, a patch of so many
      output rows and input columns, as in FP8 files.
    - `axis`: `"in"`, blocks of consecutive input channels inside an output row; `"out"`, blocks of consecutive output
      channels inside an input column (AdaDim's per-IC groups, 2309.15531).
    - `offset`: `"none"`, symmetric about zero; `"zero"`, a zero point that is itself a code; `"float"`, the middle of the
      block's range; `"mean"`, the block's mean (centering, 2212.09720 App. B).
    - `scale`: `"fp32"`, `"fp16"`, `"bf16"`, `"e8m0"` (a power of 2, 8 bits), or a scheme for the scales themselves (double
      quantization), also written `"int8:256"`: 8-bit integers in blocks of 256 scales, with a scale and an offset in fp32; or
      `"int:up6:8"`, as llama.cpp has them: 6-bit integers from 0, one fp16 scale for 8 of them; or `"ocp8:tensor"`, the e4m3
      scales of NVFP4.

    Raises `SchemeError` for anything that cannot exist.
    """

    dtype: str = "int"
    bits: int = 4
    block: int | str = 64
    axis: Axis = "in"
    offset: Offset = "none"
    scale: str | Scheme = "fp16"

    def __post_init__(self) -> None:
        """Refuse what cannot exist, and expand the shorthand of a quantized scale."""
        _check_dtype(self.dtype)
        _check_bits(self.bits)
        _check_block(self.block)
        check_choice("axis", self.axis, get_args(Axis), SchemeError)
        check_choice("offset", self.offset, get_args(Offset), SchemeError)
        object.__setattr__(self, "scale", _scale(self.scale))
        if patch_block(self.block) and self.axis != "in":
            raise SchemeError(
                f"a block of {self.block} weights has rows and columns, and no axis; leave axis out"
            )
        if self.scale == "e8m0" and self.offset in ("float", "mean"):
            raise SchemeError(
                f"scales e8m0 are powers of 2, which cannot hold the offset {self.offset}; use none or zero"
            )

    def __str__(self) -> str:
        """The scheme in one word, e.g. `nf4/64`, `int3z/128 out`, `kmeans:row4/row`; `parse_scheme` reads it back."""
        mark = {"none": "", "zero": "z", "float": "f", "mean": "m"}[self.offset]
        axis = " out" if self.axis == "out" else ""
        scale = "" if self.scale == "fp16" else f" s={scale_label(self.scale)}"
        return f"{self.dtype}{self.bits}{mark}/{self.block}{axis}{scale}"

    def to_json(self) -> dict[str, Any]:
        """The scheme as a JSON object; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scheme:
        """Read what `to_json` wrote. Raises `SchemeError` on unknown keys."""
        known = {field.name for field in fields(Scheme)}
        for key in data:
            if key not in known:
                raise SchemeError(f"a scheme has no key {key!r}; {near_matches(key, known)}", key)
        scale = data.get("scale", "fp16")
        nested = Scheme.from_json(scale) if isinstance(scale, Mapping) else scale
        return Scheme(**{**data, "scale": nested})

    def with_bits(self, bits: int) -> Scheme:
        """The same scheme at another width."""
        return replace(self, bits=bits)


def scale_label(scale: str | Scheme) -> str:
    """How a scale is written on one line: `fp16`, or `int8:256` for a scheme of scales."""
    if isinstance(scale, str):
        return scale
    return f"{scale.dtype}{scale.bits}:{str(scale.block).removeprefix('flat:')}"


def flat_block(block: int | str) -> int | None:
    """The number in `"flat:64"`, or None for a block that stays inside a line."""
    match = _FLAT.fullmatch(block) if isinstance(block, str) else None
    return int(match.group(1)) if match else None


def patch_block(block: int | str) -> tuple[int, int] | None:
    """Rows and columns of `"128x128"`, or None for any other block."""
    match = _PATCH.fullmatch(block) if isinstance(block, str) else None
    return (int(match[1]), int(match[2])) if match else None


def _scale(scale: object) -> str | Scheme:
    if isinstance(scale, Scheme):
        if isinstance(scale.scale, Scheme):
            raise SchemeError("scales of scales cannot be quantized again; use fp32, fp16 or bf16 for them")
        if scale.axis != "in":
            raise SchemeError("a scheme for scales needs axis 'in', since scales are one long row")
        return scale
    if isinstance(scale, str) and scale in FLOAT_SCALES:
        return scale
    match = _SCALE_SHORTHAND.fullmatch(scale) if isinstance(scale, str) else None
    if match is None:
        raise SchemeError(
            f"unknown scale {scale!r}; {near_matches(str(scale), FLOAT_SCALES)}, or TYPEBITS:BLOCK such as int8:256"
        )
    dtype, bits, block = match.groups()
    size = int(block) if block.isdecimal() else block
    if dtype in _SCALES_OF_SCALES:
        return Scheme(dtype, int(bits), size, offset="none", scale=_SCALES_OF_SCALES[dtype])
    return Scheme(dtype, int(bits), size, axis="in", offset="float", scale="fp32")


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        whole = isinstance(dtype, str) and not meant(dtype) and _WORD.fullmatch(as_written_here(dtype))
        hint = f"--scheme {dtype} is a whole scheme; " if whole else scheme_hint(str(dtype))
        raise SchemeError(
            f"unknown data type {dtype!r}; {hint}a data type is a name such as nf, or a name and a parameter such as power:1/2"
        )


def _check_bits(bits: object) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise SchemeError(f"bits must be an integer from 1 to 8, got {bits!r}")


def _check_block(block: object) -> None:
    if isinstance(block, int) and not isinstance(block, bool) and block > 0:
        return
    if isinstance(block, str) and (block in _NAMED_BLOCKS or _FLAT.fullmatch(block) or patch_block(block)):
        return
    raise SchemeError(
        f"unknown block {block!r}; {near_matches(str(block), _NAMED_BLOCKS)}, a number above 0, flat:N such as flat:64, or "
        "ROWSxCOLUMNS such as 128x128"
    )


def parse_scheme(word: str) -> Scheme:
    """A scheme from its word, which `str(scheme)` writes: `nf4/64`, `int3z/128 out`, `power:1/24/row s=fp32`.

    A colon may stand for the slash; without a block it is 64; FP4_E2M1 is float:e2m14. Raises `SchemeError` for anything else.
    """
    text = as_written_here(word)
    if text == "float":
        raise SchemeError(
            "float quantizes nothing and is no scheme here: leave it out, or keep single layers float with --keep PATTERN, "
            "in a recipe keep = true"
        )
    match = _WORD.fullmatch(text)
    if match is None or meant(word):
        raise SchemeError(
            f"{word!r} is not a scheme: {scheme_hint(word)}a scheme is TYPEBITS/BLOCK such as nf4/64, int3z/128 or "
            "kmeans:row2/row, then ' out' for the other axis; z, f or m after the bits is the offset"
        )
    size = match["block"] or "64"
    return Scheme(
        dtype=match["dtype"],
        bits=int(match["bits"]),
        block=int(size) if size.isdecimal() else size,
        axis="out" if match["axis"] else "in",
        offset=_OFFSETS[match["offset"]],  # type: ignore[arg-type]
        scale=match["scale"] or "fp16",
    )
