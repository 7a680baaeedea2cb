"""Proxy columns: how wide the weights of an output unit are, and how many columns a share is."""

import pytest
import torch

from fracbit.errors import RecipeError
from fracbit.importance.proxy_columns import unit_spread
from fracbit.numerics.packed import outlier_count


def test_the_spread_is_per_output_unit() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-3.0, 3.0]])
    assert unit_spread(weight).tolist() == [0.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("inputs", "share", "kept"), [(100, 0.02, 2), (64, 0.02, 1), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_a_share_keeps_at_least_one_and_never_all(inputs: int, share: float, kept: int) -> None:
    assert outlier_count(inputs, share) == kept


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_its_range(share: float) -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        outlier_count(10, share)
