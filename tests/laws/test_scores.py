"""Laws of every score of the table: one finite float that repeats, plain or of a scheme, less for more bits."""

from __future__ import annotations

import math

import pytest

from fracbit.importance import SCORES
from views import INT2, INT4, compute, view


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_one_finite_float_and_repeats(name: str) -> None:
    value = compute(name, view())
    assert isinstance(value, float)
    assert math.isfinite(value)
    assert value == compute(name, view())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_plain_or_of_a_scheme(name: str) -> None:
    method = SCORES[name]
    assert (method.plain is None) != (method.of_scheme is None)
    assert method.about


@pytest.mark.parametrize("name", [name for name, method in SCORES.items() if method.of_scheme])
def test_scores_that_know_the_scheme_fall_with_bits(name: str) -> None:
    assert compute(name, view(), INT4) < compute(name, view(), INT2)


@pytest.mark.parametrize("name", [name for name, method in SCORES.items() if method.data_free])
def test_data_free_scores_do_not_feel_the_scale_of_a_unit(name: str) -> None:
    assert compute(name, view(scale=4.0)) == pytest.approx(compute(name, view()), rel=1e-3)
