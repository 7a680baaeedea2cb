"""Laws of the lens: every perturbation has the norm that was asked for in every scaling unit, and the character it claims."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fracbit.errors import RecipeError
from fracbit.perturbation import (
    PERTURBATIONS,
    UnitOf,
    best_exponent,
    clipping,
    error_profile,
    from_units,
    noise_on,
    perturb,
    perturb_like,
    perturbation,
    relative_intensity,
    scheme_error,
    to_units,
)
from fracbit.records.scheme import Scheme

UNITS: tuple[UnitOf, ...] = (
    "row", "tensor", Scheme(block=64), Scheme(block=7), Scheme(block="row"), Scheme(block="tensor"), Scheme(block="flat:16"),
    Scheme(block=5, axis="out"), Scheme(block="row", axis="out"),
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(out: int, width: int, seed: int = 0) -> Tensor:
    """Heavy tails and rows of very different scale: where matching over the whole tensor would go wrong."""
    generator = seeded(seed)
    x = torch.randn(out, width, generator=generator) ** 3
    return x * torch.logspace(-3, 3, out)[:, None]


@given(st.sampled_from(UNITS), st.integers(1, 20), st.integers(1, 90))
def test_units_are_a_view_of_the_tensor(unit: UnitOf, out: int, width: int) -> None:
    x = tensor(out, width)
    rows, mask = to_units(x, unit)
    assert torch.equal(from_units(rows, x, unit), x)
    assert int(mask.sum()) == x.numel()
    assert not bool((rows * ~mask).any())


names = st.sampled_from(sorted(PERTURBATIONS))


@given(st.sampled_from(UNITS), names, st.floats(1e-4, 2), st.integers(2, 20), st.integers(2, 90))
def test_every_unit_has_the_intensity(
    unit: UnitOf, name: str, intensity: float, out: int, width: int
) -> None:
    x = tensor(out, width)
    delta = perturb(x, name, intensity, unit, seeded())
    got = to_units(delta, unit)[0].double().norm(dim=1) / to_units(x, unit)[0].double().norm(dim=1)
    torch.testing.assert_close(got, torch.full_like(got, intensity), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_error_of_a_scheme_is_matched_block_by_block(name: str) -> None:
    x, scheme = tensor(12, 172), Scheme("nf", 3, 64)
    error = scheme_error(x, scheme)
    delta = perturb_like(x, error, name, scheme, seeded())
    want, got = (to_units(e, scheme)[0].norm(dim=1) for e in (error, delta))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert relative_intensity(delta, x) == pytest.approx(relative_intensity(error, x), rel=1e-4)


def correlation(x: Tensor, delta: Tensor) -> float:
    ranks = [t.abs().flatten().argsort().argsort().double() for t in (x, delta)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("gaussian", -0.05, 0.05), ("uniform", -0.05, 0.05), ("growing", 0.95, 1.01), ("shrinking", -1.01, -0.95),
        ("growing-scaled", 0.4, 0.9), ("shrinking-scaled", -0.9, -0.3),
    ],
)  # fmt: skip
def test_magnitudes_follow_x_as_claimed(name: str, low: float, high: float) -> None:
    x = torch.randn(4, 4096, generator=seeded())
    assert low < correlation(x, perturb(x, name, 0.1, "tensor", seeded(1))) < high


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_signs_are_random_and_draws_are_fresh(name: str) -> None:
    x, generator = torch.randn(4, 4096, generator=seeded()), seeded(1)
    one, two = (perturb(x, name, 0.1, "row", generator) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, perturb(x, name, 0.1, "row", seeded(1)))
    assert abs(float((one * x).sum() / (one.norm() * x.norm()))) < 0.05


def test_sorted_magnitudes_are_those_of_a_gaussian() -> None:
    x = torch.randn(1, 20_000, generator=seeded())
    for name in ("growing", "shrinking"):
        delta = perturb(x, name, 1.0, "row", seeded(1)) / x.square().mean().sqrt()
        assert float((delta.abs() > 1).float().mean()) == pytest.approx(0.3173, abs=0.01)
        assert float(delta.pow(4).mean() / delta.square().mean() ** 2) == pytest.approx(3, abs=0.15)


def test_units_of_zeros_stay_zero() -> None:
    x = torch.zeros(3, 8)
    x[1] = 1.0
    for name in PERTURBATIONS:
        delta = perturb(x, name, 0.5, "row", seeded())
        assert bool(torch.isfinite(delta).all())
        assert not bool(delta[[0, 2]].any())


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.3])
def test_clipping_touches_the_largest_and_no_other(share: float) -> None:
    x = tensor(6, 2000)
    delta = clipping(x, share, "row")
    clipped = x + delta
    assert bool((delta * x <= 0).all())
    for row, moved, after in zip(x, delta, clipped, strict=True):
        count = max(1, math.ceil(2000 * share))
        assert int((moved != 0).sum()) == count
        assert float(after.abs().max()) == pytest.approx(float(row.abs().sort().values[-count - 1]), rel=1e-4)
    control = noise_on(x, delta, seeded())
    assert torch.equal(control != 0, delta != 0)
    assert float(control.norm()) == pytest.approx(float(delta.norm()), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_shares_that_clip_nothing_are_refused(share: float) -> None:
    with pytest.raises(RecipeError, match="clips nothing"):
        clipping(torch.ones(2, 4), share, "row")


@pytest.mark.parametrize("intensity", [0.0, -1.0, math.nan, math.inf])
def test_intensities_that_are_none_are_refused(intensity: float) -> None:
    with pytest.raises(RecipeError, match="is none"):
        perturb(torch.ones(2, 4), "gaussian", intensity, "row", seeded())


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gaussian'"):
        perturbation("gausian")


def test_the_profile_of_power_grows_and_that_of_int_does_not() -> None:
    """The step of sign(x)|x|^(1/3) grows as |x|^(2/3); methods.md measured .018 .040 .071 .119 by |x| on heavy tails."""
    x = (
        torch.randn(64, 4096, generator=seeded())
        / torch.randn(64, 4096, generator=seeded(1)).square().add(0.3).sqrt()
    )
    profiles = {}
    for dtype in ("int", "power"):
        profile = error_profile(x, scheme_error(x, Scheme(dtype, 8, "row")), "row", bins=8)
        assert sum(count for _, _, count in profile) == x.numel()
        profiles[dtype] = [error for _, error, _ in profile]
    assert profiles["power"] == sorted(profiles["power"])
    assert profiles["power"][-1] > 4 * profiles["power"][0]
    assert max(profiles["int"]) < 1.3 * min(profiles["int"])


def test_the_searched_exponent_follows_the_tails() -> None:
    """Short blocks of a Gaussian want nearly even steps, heavy tails in long rows a small exponent."""
    normal = torch.randn(64, 4096, generator=seeded())
    heavy = normal / torch.randn(64, 4096, generator=seeded(1)).square().add(0.1).sqrt()
    short = best_exponent(normal, Scheme(bits=4, block=64))
    long = best_exponent(heavy, Scheme(bits=4, block="row"))
    assert float(Fraction(short.dtype.removeprefix("power:"))) > float(
        Fraction(long.dtype.removeprefix("power:"))
    )
    for x, found in ((normal, short), (heavy, long)):
        fixed = scheme_error(x, Scheme("power", 4, found.block)).norm()
        assert scheme_error(x, found).norm() <= fixed
