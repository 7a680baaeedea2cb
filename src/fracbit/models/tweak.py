"""Norm tweaking: after a block is quantized, its norms alone are moved so that its output is closer to the float block's.

`adam`: Li et al. 2023, arXiv:2309.02784, Algorithm 1. One pass over the samples, Adam, the channel-wise distance

    L_dist = (1/C) sum_c ( ||mu_f^c - mu_q^c||_2 + ||(sigma_f^c)^2 - (sigma_q^c)^2||_2 ),

mean and variance over the tokens of each sample, and a learning rate that grows with depth, lr0 (1 + scale * l / L). It
learns a factor on the gain (and a shift of the bias in units of its size): gains lie between 0.01 and 100, and one
rate must fit all of them. Both blocks read the quantized chain; lr0 and `scale` are ours, since the paper does not give them.

`closed`: the factor s on a norm read by float weights W_l, now Q_l, with H = X^T X of its output, by least squares:

    (H o sum_l Q_l^T Q_l + lam I) s = diag(H sum_l W_l^T Q_l) + lam 1.

`auto` tries both and keeps the better of them, or neither, by the error on samples that neither saw. All three are entries of
the table of corrections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from fracbit.models.blocks import bias_of, gain_of, norms, weight_of
from fracbit.models.calls import device_of
from fracbit.models.correction import (
    Corrected,
    Evidence,
    Tuned,
    error,
    norm_parameters,
    run_batch,
)
from fracbit.models.family import Family
from fracbit.records.checked import Checked
from fracbit.records.progress import Progress

LEARNING_RATE = 1e-3  # of the factor on a gain, per step
DEPTH_SCALE = 1.0
CLOSED_DAMPING = 0.01
BeforeAfter: TypeAlias = tuple[Tensor, Tensor]
Variant: TypeAlias = Callable[[nn.Module, Family, Evidence], None]


class Closed(Checked):
    """The closed form; `damping` is lam, relative to the mean diagonal."""

    called: ClassVar[str] = "correction closed"
    follows: ClassVar[str] = "block"
    tokens: ClassVar[int | None] = None

    damping: float = Field(CLOSED_DAMPING, gt=0)

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Move the norms, whatever it does to the error."""
        return _tweaked(block, family, evidence, {"closed": self.move})

    def move(self, block: nn.Module, family: Family, evidence: Evidence) -> None:
        """Move the norms."""
        closed_form(block, family, evidence, self.damping)


class Adam(Checked):
    """One pass of Adam. `rate` of the first block, for the factor on a gain; it grows with depth by up to `growth`."""

    called: ClassVar[str] = "correction adam"
    follows: ClassVar[str] = "block"
    tokens: ClassVar[int | None] = None

    rate: float = Field(LEARNING_RATE, gt=0)
    growth: float = Field(DEPTH_SCALE, ge=0)

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Move the norms, whatever it does to the error."""
        return _tweaked(block, family, evidence, {"adam": self.move})

    def move(self, block: nn.Module, family: Family, evidence: Evidence) -> None:
        """Move the norms."""
        fit_by_adam(block, family, evidence, self.rate * (1 + self.growth * evidence.depth))


class Auto(Checked):
    """The better of both, or neither."""

    called: ClassVar[str] = "correction auto"
    follows: ClassVar[str] = "block"
    tokens: ClassVar[int | None] = None

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Move the norms by the one of less error, where it helps."""
        variants = {"closed": Closed().move, "adam": Adam().move}
        return _tweaked(block, family, evidence, variants, or_none=True)


def _tweaked(
    block: nn.Module,
    family: Family,
    evidence: Evidence,
    variants: Mapping[str, Variant],
    or_none: bool = False,
) -> Corrected:
    """Move the norms of `block` by the variant of least error, or not at all where none lowers it and `or_none` says so."""
    start = _snapshot(block, family)
    before = error(block, evidence)
    tried: dict[str, tuple[float, list[Tensor]]] = {}
    for name, move in variants.items():
        move(block, family, evidence)
        moved = [tensor.to(evidence.kind).to(tensor.dtype) for tensor in _snapshot(block, family)]
        _restore(block, family, moved)  # judged as it will be stored
        tried[name] = error(block, evidence), moved
        _restore(block, family, start)
    best = min(tried, key=lambda name: tried[name][0] if math.isfinite(tried[name][0]) else math.inf)
    after, tensors = tried[best]
    if not math.isfinite(after) or (or_none and not after < before):
        return Corrected(before, before, "none")
    _restore(block, family, tensors)
    return Corrected(before, after, best)


def fit_by_adam(block: nn.Module, family: Family, evidence: Evidence, rate: float) -> None:
    """One pass of Adam over the training batches, a sample at a time being too few for variances: a batch at a time."""
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    tuned = {
        name: Tuned(parameter, evidence.kind) for name, parameter in norm_parameters(block, family).items()
    }
    optimizer = torch.optim.Adam([one.change for one in tuned.values()], lr=rate)
    for number in evidence.train:
        batch = evidence.entrance.batches[number]
        wanted = evidence.exits[batch.start : batch.stop].to(device_of(block))  # [batch, tokens, width]
        values = {name: one.value() for name, one in tuned.items()}
        found = run_batch(block, evidence, number, values)  # [batch, tokens, width]
        optimizer.zero_grad()
        distance(found.float(), wanted.float()).backward()
        optimizer.step()
    for one in tuned.values():
        one.store()


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """L_dist of two outputs [samples, tokens, width]: channel means and variances, per sample, averaged."""
    means = (found.mean(1) - wanted.mean(1)).abs()  # [samples, width]
    variances = (found.var(1, unbiased=False) - wanted.var(1, unbiased=False)).abs()  # [samples, width]
    return (means + variances).mean()


def closed_form(
    block: nn.Module, family: Family, evidence: Evidence, damping: float = CLOSED_DAMPING
) -> None:
    """Multiply each norm that only linears read by its least-squares factor."""
    for norm in norms(block, family):
        readers = [name for name in norm.readers if name in evidence.weights]
        known = [name for name in readers if name in evidence.stats and evidence.stats[name].gram is not None]
        if not norm.exclusive or not known:
            continue
        # Each reader with the statistics of its own inputs, where it has some, else with those of a reader before it.
        parts: dict[str, list[BeforeAfter]] = {name: [] for name in known}
        part = known[0]
        for name in readers:
            part = name if name in parts else part
            pair = evidence.weights[name].float(), weight_of(block.get_submodule(name)).float()
            parts[part].append(pair)
        grams = {name: evidence.stats[name].gram for name in known}  # [width, width] each
        factor = least_squares_factor(
            [(gram, parts[name]) for name, gram in grams.items() if gram is not None], damping
        )  # [width]
        _scale_norm(block, norm.name, factor, family.gain_offset)


def least_squares_factor(
    parts: Sequence[tuple[Tensor, Sequence[BeforeAfter]]], damping: float = CLOSED_DAMPING
) -> Tensor:
    """The factor [in] on inputs under which quantized weights best replace float ones.

    `parts`: a gram matrix [in, in] of the inputs, and the (float, quantized) weights [out, in] of the linears that saw these.
    """
    matrix = torch.zeros_like(parts[0][0]).double()  # [in, in]
    cross_sums = torch.zeros_like(matrix[0])  # [in]
    for gram, pairs in parts:
        inner = sum((q.T @ q for _, q in pairs), torch.zeros_like(gram))  # [in, in]
        cross = sum((w.T @ q for w, q in pairs), torch.zeros_like(gram))  # [in, in]
        matrix += (gram * inner).double()
        cross_sums += (gram * cross.T).sum(1).double()
    size = float(matrix.diagonal().mean())
    if size <= 0:
        return torch.ones_like(parts[0][0][0])
    lam = damping * size
    matrix.diagonal().add_(lam)
    right = cross_sums + lam  # [in]
    found: Tensor = torch.linalg.solve(matrix, right)  # [in]
    return found.float()


def _scale_norm(block: nn.Module, name: str, factor: Tensor, offset: float) -> None:
    gain, bias = gain_of(block, name), bias_of(block.get_submodule(name))  # [width] each
    assert gain is not None
    with torch.no_grad():
        factor = factor.to(gain.device)
        gain.copy_((gain.float() + offset) * factor - offset)
        if bias is not None:
            bias.copy_(bias.float() * factor)


def _snapshot(block: nn.Module, family: Family) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in norm_parameters(block, family).values()]


def _restore(block: nn.Module, family: Family, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(norm_parameters(block, family).values(), tensors, strict=True):
            parameter.copy_(tensor)
