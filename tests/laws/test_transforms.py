"""Laws of every transform of the table: where it acts, what it gives, and that signs and factors are drawn alike again."""

from __future__ import annotations

import pytest
import torch

from fracbit.errors import RecipeError
from fracbit.numerics.stats import add_inputs, empty
from fracbit.records.scheme import Scheme
from fracbit.transforms import TRANSFORMS, transforms_of
from tensors import normal

WIDTH = 48
SCHEMES = [Scheme("int", 3, 16), Scheme("int", 4, 16, "out"), Scheme("nf", 3, "row", offset="mean")]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_acts_somewhere(name: str) -> None:
    transform = TRANSFORMS[name]
    places = [transform.factors is not None, transform.stream_signs is not None, transform.turns_inner]
    assert any(places)
    assert transform.rotates == any(places[1:])


@pytest.mark.parametrize("name", [name for name, transform in TRANSFORMS.items() if transform.factors])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dead", [False, True])
def test_factors_are_positive_finite_and_the_same_again(name: str, scheme: Scheme, dead: bool) -> None:
    find = TRANSFORMS[name].factors
    assert find is not None
    x = normal(200, WIDTH, seed=1)
    x[:, 7] *= 40
    x[:, 11] = 0
    stats = add_inputs(empty(WIDTH), torch.zeros_like(x) if dead else x)
    weights = [normal(32, WIDTH, seed=2), normal(8, WIDTH, seed=3)]
    factors = find(weights, [scheme] * 2, stats)
    assert factors.shape == (WIDTH,)
    assert bool(torch.isfinite(factors).all())
    assert bool((factors > 0).all())
    assert torch.equal(factors, find(weights, [scheme] * 2, stats))
    if dead:
        assert torch.equal(factors, torch.ones(WIDTH)), "nothing is known, so nothing is moved"


@pytest.mark.parametrize("name", [name for name, transform in TRANSFORMS.items() if transform.stream_signs])
@pytest.mark.parametrize("width", [1, 48, 172])
def test_signs_follow_the_seed(name: str, width: int) -> None:
    draw = TRANSFORMS[name].stream_signs
    assert draw is not None
    signs = draw(width, 3)
    assert signs.shape == (width,)
    assert bool((signs.abs() == 1).all())
    assert torch.equal(signs, draw(width, 3))
    assert width == 1 or not torch.equal(signs, draw(width, 4))


def test_several_keep_their_order() -> None:
    assert transforms_of(["awq", "rotate"]) == (TRANSFORMS["awq"], TRANSFORMS["rotate"])
    with pytest.raises(RecipeError, match="unknown transform 'smoth'; did you mean 'smooth'"):
        transforms_of(["rotate", "smoth"])
