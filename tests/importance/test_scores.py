"""Scores one by one: the figures that their papers imply, shares of known distributions, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from fracbit.errors import DataError, RecipeError, WeightError
from fracbit.importance import SCORES, LayerView, cosine_sum, error_of, reverse, score_method
from fracbit.importance.zd import share_above
from fracbit.numerics.stats import add_inputs, empty
from fracbit.records.scores import Scores
from tensors import normal
from views import INT2, compute, view


@pytest.mark.parametrize(
    ("draw", "one_sided"),
    [
        (lambda g: torch.randn(1000, 1000, generator=g), 0.1587),
        (lambda g: _laplace(g), 0.1215),
        (lambda g: _student(g), 0.0908),
    ],
    ids=["Gaussian", "Laplace", "Student t3"],
)
def test_zd_has_the_shares_of_known_distributions(draw: object, one_sided: float) -> None:
    weights = draw(torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert share_above([weights]) == pytest.approx(one_sided, abs=3e-3)
    assert share_above([weights], two_sided=True) == pytest.approx(2 * one_sided, abs=4e-3)


def _laplace(generator: torch.Generator) -> Tensor:
    signs = (torch.rand(1000, 1000, generator=generator) - 0.5).sign()
    return torch.empty(1000, 1000).exponential_(generator=generator) * signs


def _student(generator: torch.Generator) -> Tensor:
    squares = sum(torch.randn(1000, 1000, generator=generator).square() for _ in range(3))
    return torch.randn(1000, 1000, generator=generator) / (squares / 3).sqrt()  # type: ignore[operator]


def test_zd_pools_matrices_or_not() -> None:
    """Pooled with a matrix of a tenth of the scale, the small one has no weight above one sigma."""
    wide, narrow = normal(100, 100), normal(100, 100, seed=1) * 0.1
    unit = LayerView("l", 0, 1, {"wide": wide, "narrow": narrow})
    assert -compute("zd-per-matrix", unit) == pytest.approx(0.1587, abs=0.01)
    assert -compute("zd", unit) == pytest.approx(share_above([torch.cat([wide, narrow])]))
    assert -compute("zd", unit) < 0.13


@pytest.mark.parametrize(
    "bad", [torch.ones(4, 4), torch.full((4, 4), math.nan), torch.full((4, 4), math.inf)]
)
def test_weights_without_z_scores_are_refused(bad: Tensor) -> None:
    with pytest.raises(WeightError, match="no z-scores"):
        share_above([bad])


def test_the_cosine_drops_the_first_position() -> None:
    x = normal(3, 5, 8)
    x[:, 0] *= 1000
    total, count = cosine_sum(x, torch.cat([-x[:, :1], 2 * x[:, 1:]], 1))
    assert count == 12
    assert total == pytest.approx(12)
    assert cosine_sum(x, -x) == (pytest.approx(-12), 12)
    assert cosine_sum(x, torch.zeros_like(x)) == (0.0, 12)
    with pytest.raises(DataError, match="leave none"):
        cosine_sum(x[:, :1], x[:, :1])


def test_sequences_and_chance() -> None:
    views = [view(index=i) for i in range(3)]
    assert [compute("first", v) for v in views] == [3, 2, 1]
    assert [compute("last", v) for v in views] == [1, 2, 3]
    values = [compute("random", v) for v in views]
    assert len(set(values)) == 3
    assert all(0 <= value < 1 for value in values)


def test_the_gram_error_is_the_error_of_the_outputs() -> None:
    weight, x = normal(6, 64), normal(200, 64, seed=9)
    unit = LayerView("l", 0, 1, {"w": weight}, {"w": add_inputs(empty(64), x)})
    expected = (x @ error_of(weight, INT2).T).square().sum() / (x @ weight.T).square().sum()
    assert compute("gram-error", unit) == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(DataError, match="saw 0 tokens"):
        compute("gram-error", LayerView("l", 0, 1, {"w": weight}, {"w": empty(64)}))


def test_fisher_is_the_second_order_of_a_quadratic() -> None:
    """Independent tokens with gradients g: the loss's curvature along e is E[<g, e>^2]; means over T tokens shrink it by T."""
    error = normal(32)
    gradients = normal(400_000, 32, seed=1)
    tokens = 16
    slopes = (gradients @ error).view(-1, tokens).mean(1)
    unit = LayerView("l", 0, 1, slopes={INT2: slopes}, sample_tokens=tokens)
    expected = 0.5 * float((gradients @ error).square().mean())
    assert compute("fisher", unit) == pytest.approx(expected, rel=0.02)


def test_names() -> None:
    assert score_method("reverse:lim") is SCORES["lim"]
    with pytest.raises(RecipeError, match="did you mean 'lim'"):
        score_method("limm")
    scores = Scores({"a": 1.0, "b": 2.0}, "lim", "m")
    assert reverse(scores).order() == ("a", "b")
    assert reverse(scores).method == "reverse:lim"
