"""Law: every kernel computes what the reference computes, for every scheme, shape, batch, type and layout of activations."""

from __future__ import annotations

import pytest
import torch

from fracbit.kernels import KERNELS, PackedLinear, choose, cpu, kernel_report, reference
from fracbit.kernels.cpu import NATIVE, prepare, run, tiles_from
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme, parse_scheme
from products import batch_of, packed
from tensors import distance

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
SETS = NATIVE.instruction_sets() if NATIVE is not None else []
TOLERANCE = {"float": 1e-5, "int8": 5e-3}


DTYPES = [
    "int",
    "int:step",
    "float",
    "dynamic",
    "nf",
    "iq",
    "ocp",
    "power",
    "kmeans",
    "kmeans:row",
    "quantile",
]


BLOCKS = [8, 20, 64, "row", "tensor", "flat:43", "flat:64", "8x64"]
NO_AXIS = ("tensor", "flat:43", "flat:64", "8x64")


def legal(dtype: str, bits: int, offset: str) -> bool:
    fitted = dtype.startswith(("kmeans", "quantile"))
    if dtype in ("iq", "ocp"):
        return bits in ((4,) if dtype == "iq" else (4, 6, 8))
    if fitted and offset == "zero":
        return False
    if bits == 1:
        return dtype.startswith("kmeans") or (dtype.startswith("int") and offset in ("zero", "float"))
    return dtype != "power" or bits > 1


GRID = [
    Scheme(dtype, bits, block, axis, offset)
    for dtype in DTYPES
    for bits in range(1, 9)
    for block in BLOCKS
    for axis in ("in", "out")
    for offset in ("none", "zero", "float", "mean")
    if legal(dtype, bits, offset) and not (axis == "out" and block in NO_AXIS)
]
ENGINES_OWN = [
    parse_scheme(word)
    for word in (
        "int:step4f/32 s=int:up6:8", "int:step2f/16 s=int:up4:16", "int:step3/16 s=int:step6:16",
        "int:step6/16 s=int:step8:16", "iq4/32 s=int:step6:8",
        "ocp4/16 s=ocp8:tensor", "ocp4/32 s=e8m0", "ocp8/32 s=e8m0", "ocp8/row s=fp32", "ocp:e5m28/row s=bf16",
        "ocp8/128x128 s=fp32", "int4z/16x20 s=bf16", "int:step4f/8x64", "int4/8x16 s=int8:16",
    )
]  # fmt: skip
GRID += ENGINES_OWN


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_scheme(isa: str, bits: int) -> None:
    """All data types, blocks, axes and offsets of one width; every fourth scheme for the slower instruction sets."""
    schemes = [scheme for scheme in GRID if scheme.bits == bits]
    for scheme in schemes if isa == SETS[0] else schemes[::4]:
        weight = packed(
            scheme, (25, 172)
        )  # with 8 rows of activations: enough numbers for an error to be an average
        x = batch_of(8, 172)
        expected = reference.linear(x, weight)
        for path, tolerance in TOLERANCE.items():
            error = distance(run(prepare(weight, path, isa), x), expected)
            # One bit with a zero point is mostly zeros: what is left is smaller than the rounding of its activations.
            allowed = tolerance if bits > 1 or path == "float" else 4 * tolerance
            assert error < allowed, f"{scheme} axis {scheme.axis}, {path}: {error:.2e}"


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 8), (5, 7), (172, 64), (64, 172), (3, 3669), (33, 129), (130, 1)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_odd_shapes(isa: str, shape: tuple[int, int], bits: int) -> None:
    for axis in ("in", "out"):
        for offset in ("none", "zero"):
            weight = packed(Scheme("int", bits, 64, axis, offset), shape)
            x = batch_of(2, shape[1])
            expected = reference.linear(x, weight)
            assert distance(run(prepare(weight, "float", isa), x), expected) < 1e-5
            assert (
                distance(run(prepare(weight, "int8", isa), x), expected) < 2e-2
            )  # few sums: errors do not average out


@native
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 33, 70])
def test_batches(axis: str, rows: int) -> None:
    weight = packed(Scheme("nf", 4, 32, axis), (96, 200), outliers=3)
    x = batch_of(rows, 200)
    for path, tolerance in TOLERANCE.items():
        y = PackedLinear(weight, path)(x)
        assert y.shape == (rows, 96)
        assert distance(y, reference.linear(x, weight)) < tolerance


@native
@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_way_for_many_rows(
    dtype: torch.dtype, bf16: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows of codes or by tiles, as this processor or another would take them: one product; the last tile is short."""
    monkeypatch.setattr(cpu, "BF16_PRODUCTS", bf16)
    monkeypatch.setattr(cpu, "AVX512", avx512)
    weight = packed(Scheme("int", 4, 64, offset="float"), (2 * cpu.TILE_ROWS + 37, 2200), outliers=2)
    assert tiles_from(False, dtype) < 130
    for rows in (2, 33, 130):
        x = batch_of(rows, 2200, dtype)
        expected = reference.linear(x.float(), weight)
        for path, tolerance in TOLERANCE.items():
            y = PackedLinear(weight, path)(x)
            assert y.dtype == dtype
            assert distance(y, expected) < tolerance + (dtype != torch.float32) * 2 * torch.finfo(dtype).eps


@native
def test_quantized_scales_and_scale_types() -> None:
    for scale in ("fp32", "fp16", "bf16", "int8:256", "dynamic8:64"):
        for offset in ("none", "zero", "float"):
            weight = packed(Scheme("int", 3, 16, offset=offset, scale=scale), (40, 96))
            x = batch_of(2, 96)
            assert distance(PackedLinear(weight)(x), reference.linear(x, weight)) < 1e-5


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_not_a_number_is_not_hidden(axis: str, isa: str) -> None:
    weight = packed(Scheme("int", 4, 64, axis), (8, 640))
    for bad in (float("nan"), float("inf")):
        x = batch_of(2, 640)
        x[1, 5] = bad
        for path in TOLERANCE:
            y = run(prepare(weight, path, isa), x)
            assert torch.isfinite(y[0]).all()
            assert not torch.isfinite(y[1]).any()


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
def test_scales_folded_into_activations(scale: str, isa: str) -> None:
    """Blocks along `out` of rows that end with a whole chunk or within one; scales that are subnormal in half precision."""
    for dtype, bits, offset in (("nf", 4, "none"), ("int", 3, "float"), ("int", 4, "zero")):
        for columns, size in ((640, 1.0), (700, 1.0), (640, 1e-4)):
            weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(7)) * 0.02 * size
            stored = quantize_tensor(weight, Scheme(dtype, bits, 16, "out", offset, scale))
            x = batch_of(8, columns)
            expected = reference.linear(x, stored)
            for path, tolerance in TOLERANCE.items():
                assert distance(run(prepare(stored, path, isa), x), expected) < tolerance


def test_the_table_always_has_an_answer() -> None:
    scheme = Scheme()
    for device in ("cpu", "meta"):
        assert choose(scheme, torch.device(device), (8, 8)) in KERNELS
    assert choose(scheme, torch.device("meta"), (8, 8)).name == "reference"
    assert [line.split(":")[0] for line in kernel_report().splitlines()] == [
        kernel.name for kernel in KERNELS
    ]
