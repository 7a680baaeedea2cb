"""The cheap predictor of the better axis: its sign, and how often it is right on weights of unequal rows or columns."""

import torch

from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import add_inputs, empty
from fracbit.quantizers.adadim import expected_error, predicted_axis
from fracbit.quantizers.gptq import Gptq
from fracbit.records.scheme import Scheme


def weight(columns: float, rows: float, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = (
        torch.exp(columns * torch.randn(64, generator=random)),
        torch.exp(rows * torch.randn(48, generator=random)),
    )
    return torch.randn(48, 64, generator=random) * spread[0] * spread[1][:, None]


def test_sign():
    for scheme in (
        Scheme("int", 3, 16),
        Scheme("nf", 4, "row", offset="float"),
        Scheme("kmeans", 2, 16, scale="int8:64"),
    ):
        assert predicted_axis(weight(0.8, 0.0, 0), scheme) == "out"
        assert predicted_axis(weight(0.0, 0.8, 0), scheme) == "in"
        assert predicted_axis(torch.zeros(4, 5), scheme) == "in"
    loud = torch.zeros(64)
    loud[::2] = 1.0
    quiet = weight(0.0, 0.0, 0)
    quiet[:, 1::2] *= 50  # large columns that see no input spoil the scales of all others along the input
    assert predicted_axis(quiet, Scheme("int", 3, 16), loud) == "out"
    assert expected_error(quiet, Scheme("int", 3, 16), torch.zeros(64)) == 0


def test_it_is_mostly_right():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    stats = add_inputs(empty(64), x)
    right = 0
    for seed in range(12):
        one = weight(*((0.6, 0.1) if seed % 2 else (0.1, 0.6)), seed)
        losses = {}
        for axis in ("in", "out"):
            found = decode(Gptq()(one, Scheme("int", 3, 16, axis), stats).packed)
            losses[axis] = float(gram_errors(one - found, stats.gram).sum())
        right += predicted_axis(one, Scheme("int", 3, 16), stats.energy) == min(losses, key=losses.get)
    assert right >= 10, right
