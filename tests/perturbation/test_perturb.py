"""Perturbations: the character that each claims, clipping and its control, profiles of errors, the searched exponent."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fracbit.errors import RecipeError
from fracbit.perturbation import (
    best_exponent,
    clipping,
    error_profile,
    noise_on,
    perturb,
    perturbation,
    scheme_error,
)
from fracbit.records.scheme import Scheme
from tensors import normal, seeded, uneven


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
    x = normal(4, 4096)
    assert low < correlation(x, perturb(x, name, 0.1, "tensor", seeded(1))) < high


def test_sorted_magnitudes_are_those_of_a_gaussian() -> None:
    x = normal(1, 20_000)
    for name in ("growing", "shrinking"):
        delta = perturb(x, name, 1.0, "row", seeded(1)) / x.square().mean().sqrt()
        assert float((delta.abs() > 1).float().mean()) == pytest.approx(0.3173, abs=0.01)
        assert float(delta.pow(4).mean() / delta.square().mean() ** 2) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.3])
def test_clipping_touches_the_largest_and_no_other(share: float) -> None:
    x = uneven(6, 2000)
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
    with pytest.raises(RecipeError, match="must lie between 0 and 1"):
        clipping(torch.ones(2, 4), share, "row")


@pytest.mark.parametrize("intensity", [0.0, -1.0, math.nan, math.inf])
def test_intensities_that_are_none_are_refused(intensity: float) -> None:
    with pytest.raises(RecipeError, match="finite number above 0"):
        perturb(torch.ones(2, 4), "gaussian", intensity, "row", seeded())


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gaussian'"):
        perturbation("gausian")


def test_the_profile_of_power_grows_and_that_of_int_does_not() -> None:
    """The step of sign(x)|x|^(1/3) grows as |x|^(2/3); methods.md measured .018 .040 .071 .119 by |x| on heavy tails."""
    x = normal(64, 4096) / normal(64, 4096, seed=1).square().add(0.3).sqrt()
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
    even = normal(64, 4096)
    heavy = even / normal(64, 4096, seed=1).square().add(0.1).sqrt()
    short = best_exponent(even, Scheme(bits=4, block=64))
    long = best_exponent(heavy, Scheme(bits=4, block="row"))
    assert float(Fraction(short.dtype.removeprefix("power:"))) > float(
        Fraction(long.dtype.removeprefix("power:"))
    )
    for x, found in ((even, short), (heavy, long)):
        fixed = scheme_error(x, Scheme("power", 4, found.block)).norm()
        assert scheme_error(x, found).norm() <= fixed
