"""llama.cpp's types of blocks: which scheme each one holds as it is, and how it lies in a row. A new type is one line.

Ref: ggml-common.h of llama.cpp, build 11434.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fracbit.checkpoint.export.coded import reasons, unexportable
from fracbit.checkpoint.export.exporter import Nearest
from fracbit.checkpoint.export.gguf.block_layouts import (
    BLOCK,
    BYTES,
    EXTRA_SMALL,
    FIVES,
    FOURS,
    MICRO,
    NVIDIA,
    SIXES,
    SUPERBLOCK,
    THREES,
    TWOS,
    WIDE,
    BlockLayout,
    factor_of,
)
from fracbit.checkpoint.export.small_floats import MXFP4, NVFP4
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.integers import STEP
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme


@dataclass(frozen=True)
class BlockType:
    """A type of blocks, and the `scheme` that it holds without rounding.

    `length`: weights of a block, `bytes`: what it takes. `file_type`: llama.cpp's number of a file that has mostly this type.
    `factor`: fp32 [1], which llama.cpp keeps in a tensor beside it, called `scale`.
    """

    scheme: Scheme
    length: int
    bytes: int
    file_type: int
    layout: BlockLayout
    factor: Callable[[PackedTensor], Tensor] | None = None

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return width // self.length * self.bytes

    def rows(self, packed: PackedTensor) -> Tensor:
        """A packed weight of this scheme as rows uint8 [out, bytes]."""
        return self.layout.encode(packed)

    def packed(self, rows: Tensor) -> PackedTensor:
        """The weight that rows uint8 [out, bytes] are, but for its factor. Raises `FormatError` for what no scheme has."""
        return self.layout.decode(rows.unflatten(1, (-1, self.bytes)), self.scheme)


def _block(dtype: str, bits: int, offset: bool = False) -> Scheme:
    """The scheme of a type with blocks of 32."""
    return Scheme(dtype, bits, BLOCK, offset="float" if offset else "none")


def _super(dtype: str, bits: int, block: int, scale: str) -> Scheme:
    """The scheme of a type with superblocks: an offset goes with steps that count from 0."""
    return Scheme(dtype, bits, block, offset="float" if scale.startswith("int:up") else "none", scale=scale)


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q8_0": BlockType(_block(STEP, 8), BLOCK, 34, file_type=7, layout=BYTES),
    "Q4_0": BlockType(_block(STEP, 4), BLOCK, 18, file_type=2, layout=FOURS),
    "Q4_1": BlockType(_block(STEP, 4, True), BLOCK, 20, file_type=3, layout=FOURS),
    "Q5_0": BlockType(_block(STEP, 5), BLOCK, 22, file_type=8, layout=FIVES),
    "Q5_1": BlockType(_block(STEP, 5, True), BLOCK, 24, file_type=9, layout=FIVES),
    "IQ4_NL": BlockType(_block("iq", 4), BLOCK, 18, file_type=25, layout=FOURS),
    "MXFP4": BlockType(MXFP4, BLOCK, 17, file_type=38, layout=MICRO),
    "NVFP4": BlockType(NVFP4, 64, 36, file_type=39, layout=NVIDIA, factor=factor_of),
    "Q2_K": BlockType(_super(STEP, 2, 16, "int:up4:16"), SUPERBLOCK, 84, file_type=10, layout=TWOS),
    "Q3_K": BlockType(_super(STEP, 3, 16, "int:step6:16"), SUPERBLOCK, 110, file_type=12, layout=THREES),
    "Q4_K": BlockType(_super(STEP, 4, 32, "int:up6:8"), SUPERBLOCK, 144, file_type=15, layout=WIDE),
    "Q5_K": BlockType(_super(STEP, 5, 32, "int:up6:8"), SUPERBLOCK, 176, file_type=17, layout=WIDE),
    "Q6_K": BlockType(_super(STEP, 6, 16, "int:step8:16"), SUPERBLOCK, 210, file_type=18, layout=SIXES),
    "IQ4_XS": BlockType(
        _super("iq", 4, 32, "int:step6:8"), SUPERBLOCK, 136, file_type=30, layout=EXTRA_SMALL
    ),
}
"""Every type, by ggml's name."""


def type_of(layer: StoredLayer) -> str | None:
    """The type that holds a layer as it is; None where there is none."""
    fits = [
        name
        for name, kind in BLOCK_TYPES.items()
        if layer.scheme == kind.scheme
        and layer.shape[1] % kind.length == 0
        and not layer.outliers
        and (kind.factor is None or layer.kind != "embedding")
    ]
    return fits[0] if fits else None


@dataclass(frozen=True)
class BlockForms:
    """The forms of layers that a file holds: all `BLOCK_TYPES`, each where its length divides the inputs."""

    embeddings: bool = True

    @property
    def levels(self) -> tuple[Scheme, ...]:
        """Every scheme that some layer may have."""
        return tuple(kind.scheme for kind in BLOCK_TYPES.values())

    def nearest(self, layer: StoredLayer) -> Nearest:
        """A layer's own form, or the type that is nearest in bits, then in offset, data type and size, with as many bits."""
        refused = unexportable(layer)
        if refused is not None:
            return refused
        fits = [kind for kind in BLOCK_TYPES.values() if layer.shape[1] % kind.length == 0]
        if layer.kind == "embedding":
            fits = [kind for kind in fits if kind.factor is None]  # rows of a table are looked up without it
        if not fits:
            return Nearest("float", f"no block of the format divides its {layer.shape[1]} inputs")
        asked = layer.scheme

        def distance(kind: BlockType) -> tuple[bool, int, bool, bool, float]:
            new = kind.scheme
            bare = (new.offset == "none") != (asked.offset == "none")
            other = new.dtype != (asked.dtype if asked.dtype in ("iq", "ocp") else STEP)
            return new.bits < asked.bits, abs(new.bits - asked.bits), bare, other, kind.bytes / kind.length

        own = [kind.scheme for kind in fits if kind.scheme == asked]
        new = own[0] if own else min(fits, key=distance).scheme
        return Nearest(new, ", ".join(reasons(layer, new)))

    def with_scales(self, kind: str) -> BlockForms:
        """The same: every type has scales of fp16."""
        return self


GGUF_FORMS = BlockForms()
