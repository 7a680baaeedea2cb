"""Laws over all data types x bits x blocks x axes x offsets x scales, on odd shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fracbit.errors import FormatError, SchemeError, WeightError
from fracbit.numerics import (
    DATATYPES,
    decode,
    fixed_type,
    from_parts,
    part_shapes,
    parts_of,
    quantize_tensor,
    stored_bits,
)
from fracbit.numerics.bits import has_top_code, pack_bits, row_bytes, unpack_bits
from fracbit.numerics.datatypes import EXPONENTS, check_datatype, is_fitted
from fracbit.numerics.grid import codes_of, moved, values_of
from fracbit.numerics.layout import block_sums
from fracbit.numerics.packed import check_values, table_of, zeros_of
from fracbit.numerics.ranges import EvenErrors, fit, grid_error, power_of
from fracbit.records.scheme import Scheme, parse_scheme

PARAMETERS = {
    "int": ["", ":step"],
    "float": ["", ":e3m0"],
    "ocp": ["", ":e5m2"],
    "power": ["", ":1/2", ":fit"],
    "kmeans": ["", ":row"],
}
BLOCKS: list[int | str] = [1, 7, 64, 1000, "row", "tensor", "flat:32", "4x16"]
SCALES = ["fp32", "fp16", "bf16", "int8:16", "int:up6:8", "int:step6:16", "e8m0", "ocp8:tensor"]


def legal(scheme: Scheme) -> bool:
    try:
        check_datatype(scheme)
    except SchemeError:
        return False
    return True


def dtypes() -> list[str]:
    return [name + suffix for name in DATATYPES for suffix in PARAMETERS.get(name, [""])]


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    dtype, bits = draw(st.sampled_from(dtypes())), draw(st.integers(1, 8))
    block, axis = draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(["in", "out"]))
    axis = "in" if block == "4x16" else axis
    offset, scale = draw(st.sampled_from(["none", "zero", "float", "mean"])), draw(st.sampled_from(SCALES))
    if scale == "e8m0" and offset in ("float", "mean"):
        return draw(schemes())
    if scale == "int:up6:8" and offset == "mean":
        return draw(schemes())
    made = Scheme(dtype, bits, block, axis, offset, scale)
    return made if legal(made) else draw(schemes())


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Heavy tails, uneven rows, a dead row and a dead column."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight = weight + 0.1 * torch.randn(rows, columns, generator=generator) ** 3
    weight[rows // 2], weight[:, columns // 2] = 0, 0
    return weight


def fixed_grid() -> Iterator[Scheme]:
    for dtype, bits, offset in product(dtypes(), range(1, 9), ["none", "zero"]):
        scheme = Scheme(dtype, bits, offset=offset)  # type: ignore[arg-type]
        if legal(scheme) and not is_fitted(scheme):
            yield scheme


@pytest.mark.parametrize("scheme", list(fixed_grid()), ids=str)
def test_a_fixed_table_is_ascending_within_one_and_small_enough(scheme: Scheme) -> None:
    table = fixed_type(scheme)
    values = table.values[0]
    assert bool((values.diff() > 0).all())
    assert (float(values[0]), float(values[-1])) == pytest.approx(table.span) or table.step is None
    assert 0.5 <= float(values.abs().max()) <= 1
    assert float(values.abs().max()) == 1 or scheme.dtype.startswith(("int:step", "iq", "ocp", "kmeans"))
    assert not table.lopsided or float(values.abs().max()) == abs(table.far)
    assert 2 <= len(values) <= 2**scheme.bits
    assert bool((table.boundaries[0] >= values[:-1]).all())
    assert bool((table.boundaries[0] <= values[1:]).all())
    if scheme.offset == "none" and scheme.dtype != "iq":  # whose table, that of llama.cpp, has none
        assert 0 in values.tolist()
    assert torch.equal(table.nearest(values[None])[0].long(), torch.arange(len(values)))


@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("offset", ["none", "zero", "float"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_whole_steps_are_exact_in_the_type_of_the_scale(bits: int, offset: str, scale: str) -> None:
    """Engines store the step: for tiny blocks too it has the scale's type, and steps times whole numbers are the weights."""
    scheme = Scheme("int:step", bits, 16, offset=offset, scale=scale)  # type: ignore[arg-type]
    weight = weights(32, 64, bits) * torch.logspace(-8, 1, 32)[:, None]
    for search in (False, True):
        packed = quantize_tensor(weight, scheme, search=search)
        unit = fixed_type(scheme).unit
        assert isinstance(packed.scales, torch.Tensor)
        step = packed.scales.float() * unit  # [32, 4]
        assert torch.equal(step.to(packed.scales.dtype).float(), step)
        codes = unpack_bits(packed.codes, bits, 64).float().view(32, 4, 16)
        if offset == "none":
            base = torch.full((32, 4), -(2.0 ** (bits - 1)))
        elif offset == "zero":
            base = -zeros_of(packed, (32, 4)).float()
        else:
            base = torch.zeros(32, 4)
        whole = (codes + base[..., None]) * step[..., None]
        if offset == "float":
            assert isinstance(packed.offsets, torch.Tensor)
            whole += packed.offsets.float()[..., None]
        exact = 0 if scale != "fp32" else 1e-5  # products with 24 bits round
        assert torch.allclose(whole.view(32, 64), decode(packed), rtol=exact, atol=exact * 1e-3)


@pytest.mark.parametrize("word", ["int:step4/32 s=int:up6:8", "iq4/32 s=int:up6:8"])
def test_scales_that_count_up_have_one_sign(word: str) -> None:
    """Blocks that lie on either side of 0 keep their scales."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    wrong = float((decode(quantize_tensor(weight, parse_scheme(word))) - weight).norm() / weight.norm())
    assert wrong < 0.12
    with pytest.raises(SchemeError, match="means of blocks have two"):
        check_datatype(parse_scheme("int4m/32 s=int:up6:8"))


def test_whole_steps_are_no_worse_than_the_symmetric_grid_by_much() -> None:
    """All 2^k values are used: with a search and with zero points it rounds about as well as `int`."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for bits, offset, search in product((2, 3, 4, 8), ("none", "zero", "float"), (False, True)):
        found = [
            float(
                (
                    decode(quantize_tensor(weight, Scheme(name, bits, 64, offset=offset), search=search))
                    - weight
                ).norm()
            )  # type: ignore[arg-type]
            for name in ("int:step", "int")
        ]
        assert found[0] < 1.03 * found[1], (bits, offset, search, found)


@given(schemes(), st.integers(1, 40), st.integers(1, 90), st.integers(0, 99), st.booleans())
@settings(max_examples=150, deadline=None)
def test_round_trip(scheme: Scheme, rows: int, columns: int, seed: int, outliers: bool) -> None:
    """Bytes are what the shapes say; packing is lossless; encoding what was decoded changes nothing."""
    weight = weights(rows, columns, seed)
    kept = torch.tensor([0, columns - 1]) if outliers and columns > 2 else None
    packed = quantize_tensor(weight, scheme, columns=kept)
    parts = dict(parts_of(packed))
    for name, (allowed, size) in part_shapes(scheme, packed.shape, 0 if kept is None else 2).items():
        assert parts[name].dtype in allowed
        assert tuple(parts[name].shape) == size
    assert stored_bits(packed) == 8 * sum(part.numel() * part.element_size() for part in parts.values())
    again = from_parts(scheme, packed.shape, parts)
    restored = decode(packed)
    assert torch.equal(decode(again), restored)
    assert bool(torch.isfinite(restored).all())
    if kept is not None:
        assert torch.allclose(restored[:, kept], weight[:, kept], rtol=2**-10, atol=1e-6)


@given(schemes(), st.integers(1, 30), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_rounding_is_idempotent_and_nearest(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    weight = weights(rows, columns, seed)
    grid = fit(weight, scheme)
    codes = codes_of(weight, grid)
    values = values_of(codes, grid)
    spacing = 1e-5 * float(weight.abs().max() + 1e-9)
    again = values_of(codes_of(values, grid), grid)
    assert torch.allclose(again, values, atol=spacing)
    if scheme.dtype.startswith("power") and not is_fitted(scheme):
        return  # rounds in its own space
    table = grid.table.values
    for other in range(grid.table.levels):
        alternative = values_of(torch.full_like(codes, other), grid)
        assert bool(((values - weight).abs() <= (alternative - weight).abs() + spacing).all()), table


@pytest.mark.parametrize("block", [32, "row", "tensor"])
def test_a_searched_exponent_is_not_worse_than_any_fixed_one(block: int | str) -> None:
    """It rounds to the nearest value where a fixed power rounds in its own space; its table is kept in 16 bits."""
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for weight in (normal, normal**3, normal.sign() * 0.5 + 0.01 * normal):
        errors = {
            exponent: float(
                (decode(quantize_tensor(weight, Scheme(f"power:{exponent}", 4, block))) - weight).norm()
            )
            for exponent in ("fit", *EXPONENTS)
        }
        assert errors.pop("fit") <= 1.002 * min(errors.values())


@pytest.mark.parametrize("scheme", [each for each in fixed_grid() if each.offset == "none"], ids=str)
def test_cells_give_the_codes_that_a_search_gives(scheme: Scheme) -> None:
    """Also at a boundary and beside it, beyond the ends, and without a crash where a number is none."""
    table = fixed_type(scheme)
    edges = table.boundaries[0]
    beside = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-9.0, 9.0)]
    drawn = torch.randn(1 << 13, generator=torch.Generator().manual_seed(0)) / 2
    x = torch.cat([drawn, edges, *beside, torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf])])
    expected = torch.bucketize(x, edges).to(torch.uint8)
    assert table.cells is not None or scheme.bits > 6
    if table.cells is not None:
        assert torch.equal(table.cells.count(x), expected)
        assert torch.equal(
            table.cells.count(drawn.view(2, -1)[:, ::2]), expected[: len(drawn)].view(2, -1)[:, ::2]
        )
        assert table.cells.count(torch.tensor([torch.nan])) <= len(edges)
    if table.step is None:
        assert torch.equal(table.nearest(x[None])[0], expected)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("axis", ["in", "out"])
def test_error_falls_with_bits(dtype: str, axis: str) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in range(2, 9):
        if not legal(Scheme(dtype, bits)):
            continue
        packed = quantize_tensor(weight, Scheme(dtype, bits, 32, axis))  # type: ignore[arg-type]
        errors.append(float((decode(packed) - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)


@given(schemes(), st.integers(2, 30), st.integers(2, 70), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_search_never_hurts(scheme: Scheme, rows: int, columns: int, seed: int, weighted: bool) -> None:
    if not isinstance(scheme.scale, str):
        return  # the search is done before the scales are rounded a second time
    weight = weights(rows, columns, seed)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) if weighted else None
    power = power_of(importance)
    plain = grid_error(weight, fit(weight, scheme, importance), importance, power)
    found = grid_error(weight, fit(weight, scheme, importance, search=True), importance, power)
    assert found <= plain * (1 + 1e-5) + 1e-12


@example(Scheme("int", 1, 1, offset="float"), "int4:64", 0, False)  # scales of 0, whose neighbours are not
@given(schemes(), st.sampled_from(["int4:64", "int8:256", "nf3:32"]), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_quantized_scales_settle_where_they_lose_least(
    scheme: Scheme, scale: str, seed: int, weighted: bool
) -> None:
    scheme = replace(scheme, scale=scale)
    weight = weights(24, 70, seed)
    importance = torch.rand(70, generator=torch.Generator().manual_seed(seed)) if weighted else None
    power = power_of(importance)
    found = fit(weight, scheme, importance, search=True)
    kept = moved(found, found.scale, found.shift, near=True)
    assert torch.equal(kept.scale, found.scale)
    assert found.shift is None or torch.equal(kept.shift, found.shift)  # type: ignore[arg-type]
    with patch("fracbit.numerics.ranges._settled", lambda weight, grid, importance: grid):
        rounded = fit(weight, scheme, importance, search=True)
    best, before = (grid_error(weight, grid, importance, power) for grid in (found, rounded))
    assert best <= before * (1 + 1e-5) + 1e-12


NESTED = [
    "int4:64",
    Scheme("int", 3, 256, scale="fp32"),
    Scheme("int", 3, 256, offset="mean", scale="fp32"),
    Scheme("int", 4, 64, offset="mean"),
]


@pytest.mark.parametrize("scale", NESTED, ids=str)
@pytest.mark.parametrize("offset", ["none", "zero", "float", "mean"])
def test_settling_gains_and_makes_no_scale_negative(scale: Any, offset: Any) -> None:
    scheme = Scheme("int", 3, 24, offset=offset, scale=scale)
    sizes = torch.logspace(-2, 1, 16).repeat_interleave(24)  # blocks of very different size
    weight = weights(32, 384, 0) * sizes
    found = fit(weight, scheme, search=True)
    with patch("fracbit.numerics.ranges._settled", lambda weight, grid, importance: grid):
        rounded = fit(weight, scheme, search=True)
    best, before = (grid_error(weight, grid, None, 4) for grid in (found, rounded))
    assert best < before
    assert not bool(((found.scale < 0) & (rounded.scale >= 0)).any())


def test_settling_leaves_blocks_that_do_not_count() -> None:
    weight, scheme = weights(24, 96, 0), Scheme("int", 3, 24, offset="float", scale="int4:64")
    importance = torch.cat([torch.ones(48), torch.zeros(48)])
    found = fit(weight, scheme, importance, search=True)
    with patch("fracbit.numerics.ranges._settled", lambda weight, grid, importance: grid):
        rounded = fit(weight, scheme, importance, search=True)
    assert torch.equal(found.scale[:, 2:], rounded.scale[:, 2:])


@example(Scheme("int", 2, 1, offset="float"), 24, 70, 0, False)  # scales of 0
@example(Scheme("int", 1, 1, offset="zero"), 2, 44, 0, True)  # blocks much larger than most
@given(schemes(), st.integers(2, 30), st.integers(2, 70), st.integers(0, 99), st.booleans())
@settings(max_examples=100, deadline=None)
def test_errors_in_units_of_steps_are_those_of_the_decoded_weights(
    scheme: Scheme, rows: int, columns: int, seed: int, weighted: bool
) -> None:
    scheme = replace(scheme, dtype="int", bits=max(scheme.bits, 2))
    weight = weights(rows, columns, seed)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) if weighted else None
    grid = fit(weight, scheme, importance)
    unit = float(grid.scale.mean()) or 1.0
    wrong = ((values_of(codes_of(weight, grid), grid) - weight) / unit).pow(power_of(importance))  # [out, in]
    wanted = block_sums(wrong if importance is None else wrong * importance, scheme)
    found = EvenErrors(weight, importance, grid, unit=unit)(grid)
    assert found.shape == wanted.shape
    # Both are small differences of numbers as large as the scale, in fp32.
    power, noise = power_of(importance), 1e-6 * grid.scale / unit  # [per block]
    room = 1e-3 * wanted + power * wanted ** (1 - 1 / power) * noise + 1e-9  # [per block]
    assert bool(((found - wanted).abs() <= room).all())


@pytest.mark.parametrize("dtype", ["int", "nf", "kmeans"])
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_a_search_does_not_depend_on_the_size_of_the_weights(dtype: str, size: float) -> None:
    """Errors are raised to the fourth power: those of small weights must not vanish, those of large ones stay finite."""
    weight = weights(24, 70, 0)
    scheme = Scheme(dtype, 3, 16, scale="fp32")
    codes = [codes_of(x, fit(x, scheme, search=True)) for x in (weight, weight * size)]
    assert float((codes[0] != codes[1]).float().mean()) < 0.01


def test_importance_moves_the_error_to_where_it_costs_little() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(256)
    importance[::4] = 100
    for dtype in ("int", "kmeans", "kmeans:row"):
        plain = decode(quantize_tensor(weight, Scheme(dtype, 3, 64), search=True))
        aware = decode(quantize_tensor(weight, Scheme(dtype, 3, 64), importance, search=True))
        assert float((importance * (aware - weight) ** 2).sum()) < float(
            (importance * (plain - weight) ** 2).sum()
        )


@given(st.integers(1, 8), st.integers(0, 9), st.integers(1, 100), st.integers(0, 99))
@settings(deadline=None)
def test_bits_pack_densely(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(
        0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, row_bytes(count, bits))
    assert row_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    for row in range(min(rows, 2)):
        stream = sum(int(code) << (i * bits) for i, code in enumerate(codes[row].tolist()))
        assert bytes(packed[row].tolist()) == stream.to_bytes(packed.shape[1], "little")
    assert has_top_code(packed, bits, count) == bool((codes == 2**bits - 1).any())
    few = codes.clamp(max=2**bits - 2) if bits > 1 else torch.zeros_like(codes)
    assert not has_top_code(pack_bits(few, bits), bits, count)


def test_a_code_without_a_value_is_found() -> None:
    """Most tables lack at most the top code, which is found without unpacking; small floats of 8 bits lack those of NaN."""
    counted = 0
    for dtype, bits, offset in product(dtypes(), range(1, 9), ("none", "zero", "float", "mean")):
        scheme = Scheme(dtype, bits, 64, offset=offset)
        if legal(scheme) and not is_fitted(scheme):
            levels = fixed_type(scheme).levels
            assert levels <= 2**bits, scheme
            packed = quantize_tensor(weights(4, 64, 0), scheme)
            for wrong in range(levels, 2**bits):
                codes = torch.zeros(4, 64, dtype=torch.uint8)
                codes[2, 33] = wrong
                with pytest.raises(FormatError, match="stands for no value"):
                    check_values(replace(packed, codes=pack_bits(codes, bits)))
            check_values(packed)
            counted += 1
    assert counted > 100


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("int", 1.16e-2), ("float:e2m1", 1.49e-2), ("float:e3m0", 3.5e-2), ("nf", 8.5e-3), ("quantile", 9.5e-3),
        ("power", 2.28e-2), ("power:1/2", 1.35e-2),
    ],
)  # fmt: skip
def test_reference_errors_of_a_normal_tensor(dtype: str, expected: float) -> None:
    """Relative squared error of standard normal weights at 4 bits and block 64."""
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(7))
    packed = quantize_tensor(weight, Scheme(dtype, 4, 64, scale="fp32"))
    found = float((decode(packed) - weight).square().sum() / weight.square().sum())
    assert found == pytest.approx(expected, rel=0.03)


def test_published_tables() -> None:
    """NF4 as in QLoRA's appendix and bitsandbytes; FP4 (E2M1) as bitsandbytes' table of twelfths."""
    nf4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
           0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
    assert fixed_type(Scheme("nf", 4)).values[0].tolist() == pytest.approx(nf4, abs=2e-7)
    magnitudes = [0, 0.0625, 2, 3, 4, 6, 8, 12]
    fp4 = sorted({sign * m / 12 for m in magnitudes for sign in (1, -1)})
    assert fixed_type(Scheme("float:e2m1", 4)).values[0].tolist() == pytest.approx(fp4, abs=1e-7)
    assert fixed_type(Scheme("float:e3m0", 4)).values[0].tolist() == pytest.approx(
        [-(2.0**-e) for e in range(7)] + [0] + [2.0**-e for e in range(6, -1, -1)]
    )
    dynamic = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375,
               0.6625, 0.8875, 1]  # fmt: skip
    assert fixed_type(Scheme("dynamic", 4)).values[0].tolist() == pytest.approx(dynamic)


def test_power_rounds_in_its_own_space() -> None:
    table = fixed_type(Scheme("power", 4))
    u = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    codes = table.nearest((u**3).float()[None])[0].long() - 7
    away = (u * 7 - (u * 7).round()).abs() < 0.49  # off the boundaries, where fp32 decides
    assert torch.equal(codes[away], (u * 7).round().long()[away])


def test_block_64_of_a_width_of_172_has_a_short_block_of_its_own() -> None:
    weight = torch.ones(8, 172)
    weight[:, 128:] = 0.001
    packed = quantize_tensor(weight, Scheme("int", 4, 64))
    assert isinstance(packed.scales, torch.Tensor)
    assert packed.scales.shape == (8, 3)
    assert torch.allclose(decode(packed), weight, rtol=1e-3)


def test_out_axis_is_the_transposed_in_axis() -> None:
    weight = weights(100, 60, 3)
    for block in (7, 64, "row"):
        across = decode(quantize_tensor(weight, Scheme("nf", 3, block, "out")))
        assert torch.equal(
            across, decode(quantize_tensor(weight.T.contiguous(), Scheme("nf", 3, block, "in"))).T
        )


def test_flat_blocks_cross_rows() -> None:
    weight = weights(6, 10, 0)
    flat = decode(quantize_tensor(weight, Scheme("int", 4, "flat:15")))
    assert torch.equal(
        flat.view(4, 15), decode(quantize_tensor(weight.reshape(4, 15), Scheme("int", 4, "row")))
    )


def test_three_bits_cost_three_bits() -> None:
    packed = quantize_tensor(torch.randn(64, 128), Scheme("int", 3, 64, scale="fp16"))
    assert stored_bits(packed) / (64 * 128) == 3 + 16 / 64
    packed = quantize_tensor(torch.randn(64, 128), Scheme("int", 3, 64, offset="zero"))
    assert stored_bits(packed) / (64 * 128) == 3 + 16 / 64 + 8 / 128  # two 3-bit zeros a row take a byte


def test_double_quantization_costs_what_it_stores() -> None:
    packed = quantize_tensor(torch.randn(256, 1024), Scheme("nf", 4, 64, scale="int8:256"))
    assert stored_bits(packed) / (256 * 1024) == pytest.approx(4 + 8 / 64 + 64 / 64 / 256)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers_are_refused(bad: float) -> None:
    weight = torch.randn(4, 8)
    weight[1, 2] = bad
    with pytest.raises(WeightError, match="1 of 32 weights are NaN or Inf"):
        quantize_tensor(weight, Scheme())


def test_a_scale_that_does_not_fit_names_the_remedy() -> None:
    with pytest.raises(WeightError, match=r"scheme\.scale bf16 or fp32"):
        quantize_tensor(torch.full((2, 4), 1e6), Scheme(scale="fp16"))
    tiny = torch.full((2, 64), 1e-9)
    assert isinstance(scales := quantize_tensor(tiny, Scheme("nf", 4, scale="fp16")).scales, torch.Tensor)
    assert bool((scales > 0).all())
    assert torch.allclose(decode(quantize_tensor(tiny, Scheme("nf", 4, scale="bf16"))), tiny, rtol=0.01)


def test_parts_that_do_not_fit_are_refused() -> None:
    packed = quantize_tensor(torch.randn(8, 64), Scheme("nf", 3, 32))
    parts = dict(parts_of(packed))
    with pytest.raises(FormatError, match="codes"):
        from_parts(packed.scheme, packed.shape, {**parts, "codes": parts["codes"][:, 1:]})
    with pytest.raises(FormatError, match="stores"):
        from_parts(packed.scheme, packed.shape, {"codes": parts["codes"]})


def test_fitted_tables_are_stored_and_used() -> None:
    for dtype, rows in [("kmeans", 1), ("kmeans:row", 8), ("quantile", 1)]:
        packed = quantize_tensor(weights(8, 100, 1), Scheme(dtype, 3, "row"))
        assert is_fitted(packed.scheme)
        assert packed.table is not None
        assert packed.table.shape == (rows, 8)
        assert bool((table_of(packed).values.diff(dim=1) >= 0).all())
