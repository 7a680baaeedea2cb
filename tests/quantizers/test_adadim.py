"""The cheap predictor of the better axis: its sign, and how often it is right on weights of unequal rows or columns."""

import torch

from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import empty, observe
from fracbit.quantizers.adadim import predicted_axis, scale_spread
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
    assert predicted_axis(weight(0.8, 0.0, 0)) == "out"
    assert predicted_axis(weight(0.0, 0.8, 0)) == "in"
    assert scale_spread(torch.zeros(4, 5)) == 0.0
    dead = weight(0.8, 0.0, 0)
    assert scale_spread(dead, torch.zeros(64)) < 0, "columns that see no input do not count"


def test_it_is_mostly_right():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    stats = observe(empty(64), x)
    right = 0
    for seed in range(12):
        one = weight(*((0.6, 0.1) if seed % 2 else (0.1, 0.6)), seed)
        losses = {}
        for axis in ("in", "out"):
            found = decode(Gptq()(one, Scheme("int", 3, 16, axis), stats).packed)
            losses[axis] = float(gram_errors(one - found, stats.gram).sum())
        right += predicted_axis(one, stats.energy) == min(losses, key=losses.get)
    assert right >= 10, right
