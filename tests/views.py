"""A unit of a model as scores see it, with everything that any of them asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.importance import SCORES, LayerView, error_of
from fracbit.numerics.stats import add_inputs, empty
from fracbit.records.scheme import Scheme
from tensors import normal

INT2, INT4 = Scheme(bits=2), Scheme(bits=4)


def slope(weights: dict[str, Tensor], scheme: Scheme, seed: int) -> Tensor:
    return torch.stack(
        [(normal(*w.shape, seed=seed) * error_of(w, scheme)).sum() for w in weights.values()]
    ).sum()


def view(seed: int = 0, index: int = 0, scale: float = 1.0) -> LayerView:
    """A unit of two linears with everything that any score asks for."""
    weights = {"a": normal(24, 64, seed=seed) * scale, "b": normal(64, 24, seed=seed + 1) * scale}
    stats = {
        name: add_inputs(empty(w.shape[1]), normal(50, w.shape[1], seed=seed + 2))
        for name, w in weights.items()
    }
    gradients = {name: normal(*w.shape, seed=seed + 3) for name, w in weights.items()}
    slopes = {scheme: torch.stack([slope(weights, scheme, s) for s in range(4)]) for scheme in (INT2, INT4)}
    return LayerView(
        f"l{index}", index, 3, weights, stats, gradients, slopes, 16, 0.9, {INT2: 0.5, INT4: 0.01}, 7
    )


def compute(name: str, unit: LayerView, scheme: Scheme = INT2) -> float:
    method = SCORES[name]
    if method.plain is not None:
        return method.plain(unit)
    assert method.of_scheme is not None
    return method.of_scheme(unit, scheme)
