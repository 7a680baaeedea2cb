"""Laws of all perturbations: the norm that was asked for in every scaling group, random signs, and zeros left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fracbit.perturbation import (
    PERTURBATIONS,
    ScalingGroups,
    from_groups,
    perturb,
    perturb_like,
    relative_intensity,
    scheme_error,
    to_groups,
)
from fracbit.records.scheme import Scheme
from tensors import normal, seeded, uneven

GROUPS: tuple[ScalingGroups, ...] = (
    "row", "tensor", Scheme(block=64), Scheme(block=7), Scheme(block="row"), Scheme(block="tensor"), Scheme(block="flat:16"),
    Scheme(block="3x16"),
    Scheme(block=5, axis="out"), Scheme(block="row", axis="out"),
)  # fmt: skip


@given(st.sampled_from(GROUPS), st.integers(1, 20), st.integers(1, 90))
def test_groups_are_a_view_of_the_tensor(groups: ScalingGroups, out: int, width: int) -> None:
    x = uneven(out, width)
    rows, mask = to_groups(x, groups)
    assert torch.equal(from_groups(rows, x, groups), x)
    assert int(mask.sum()) == x.numel()
    assert not bool((rows * ~mask).any())


names = st.sampled_from(sorted(PERTURBATIONS))


@given(st.sampled_from(GROUPS), names, st.floats(1e-4, 2), st.integers(2, 20), st.integers(2, 90))
def test_every_group_has_the_intensity(
    groups: ScalingGroups, name: str, intensity: float, out: int, width: int
) -> None:
    x = uneven(out, width)
    delta = perturb(x, name, intensity, groups, seeded())
    got = to_groups(delta, groups)[0].double().norm(dim=1) / to_groups(x, groups)[0].double().norm(dim=1)
    torch.testing.assert_close(got, torch.full_like(got, intensity), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_error_of_a_scheme_is_matched_block_by_block(name: str) -> None:
    x, scheme = uneven(12, 172), Scheme("nf", 3, 64)
    error = scheme_error(x, scheme)
    delta = perturb_like(x, error, name, scheme, seeded())
    want, got = (to_groups(e, scheme)[0].norm(dim=1) for e in (error, delta))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert relative_intensity(delta, x) == pytest.approx(relative_intensity(error, x), rel=1e-4)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_signs_are_random_and_draws_are_fresh(name: str) -> None:
    x, generator = normal(4, 4096), seeded(1)
    one, two = (perturb(x, name, 0.1, "row", generator) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, perturb(x, name, 0.1, "row", seeded(1)))
    assert abs(float((one * x).sum() / (one.norm() * x.norm()))) < 0.05


def test_groups_of_zeros_stay_zero() -> None:
    x = torch.zeros(3, 8)
    x[1] = 1.0
    for name in PERTURBATIONS:
        delta = perturb(x, name, 0.5, "row", seeded())
        assert bool(torch.isfinite(delta).all())
        assert not bool(delta[[0, 2]].any())
