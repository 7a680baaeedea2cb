"""Norm tweaking: after a block is quantized, its norms alone are moved so that it gives what the float block gave.

`adam`: Li et al. 2023, arXiv:2309.02784, Algorithm 1. One pass over the samples, Adam, the channel-wise distance

    L_dist = (1/C) sum_c ( ||mu_f^c - mu_q^c||_2 + ||(sigma_f^c)^2 - (sigma_q^c)^2||_2 ),

mean and variance over the tokens of each sample, and a learning rate that grows with depth, lr0 (1 + scale * l / L). What is
learned is a factor on the gain (and a shift of the bias in units of its size): gains lie between 0.01 and 100, and one
rate must fit all of them. Both blocks read the quantized chain; lr0 and `scale` are ours, the paper's are not known.

`closed`: the factor s on a norm that feeds float weights W_l, now Q_l, with inputs H = X^T X, least squares without a rate:

    (H o sum_l Q_l^T Q_l + lam I) s = diag(H sum_l W_l^T Q_l) + lam 1.

`auto` tries both and keeps the better of them, or neither, by the error on samples that neither saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fracbit.models.blocks import bias_of, gain_of, norms, weight_of
from fracbit.models.calls import device_of
from fracbit.models.family import Family
from fracbit.models.walk import Hidden, forward
from fracbit.numerics.stats import Stats

LEARNING_RATE = 1e-3  # of the factor on a gain, per step
DEPTH_SCALE = 1.0
CLOSED_DAMPING = 0.01
How = Literal["auto", "adam", "closed"]


@dataclass(frozen=True)
class Tweaked:
    """What tweaking a block bought: relative squared error of its output on held-out samples before and after.

    `kept` says which variant stayed, `none` where no one helped.
    """

    before: float
    after: float
    kept: str

    def to_json(self) -> dict[str, object]:
        """As the record of a shard holds it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a block is tweaked with. `entrance` and `exits` are the hidden states before it and after the float block.

    `train` and `judge` number the batches to fit and to judge by. `weights` are the float weights [out, in] of the linears by
    name, `stats` the statistics of their inputs, for the closed form.
    """

    entrance: Hidden
    exits: Tensor
    train: Sequence[int]
    judge: Sequence[int]
    weights: Mapping[str, Tensor]
    stats: Mapping[str, Stats]


def tweak_block(block: nn.Module, family: Family, evidence: Evidence, how: How, depth: float) -> Tweaked:
    """Move the norms of a quantized `block`, in place; `depth` is 0 for the first block, towards 1 for the last."""
    variants: dict[str, Callable[[], None]] = {
        "closed": lambda: closed_form(block, family, evidence),
        "adam": lambda: adam(block, family, evidence, LEARNING_RATE * (1 + DEPTH_SCALE * depth)),
    }
    start = _snapshot(block, family)
    before = error(block, evidence)
    tried: dict[str, tuple[float, list[Tensor]]] = {}
    for name in ("closed", "adam") if how == "auto" else (how,):
        variants[name]()
        tried[name] = error(block, evidence), _snapshot(block, family)
        _restore(block, family, start)
    best = min(tried, key=lambda name: tried[name][0])
    after, tensors = tried[best]
    if how == "auto" and not after < before:
        return Tweaked(before, before, "none")
    _restore(block, family, tensors)
    return Tweaked(before, after, best)


def error(block: nn.Module, evidence: Evidence) -> float:
    """Squared error of the block's output on the held-out batches, relative to what the float block adds to its input."""
    wrong = added = 0.0
    for number in evidence.judge:
        batch = evidence.entrance.batches[number]
        entrance, wanted = (
            x[batch.start : batch.stop].float() for x in (evidence.entrance.states, evidence.exits)
        )
        with torch.no_grad():
            found = _run(block, evidence, number).float().to(wanted.device)
        wrong += float((found - wanted).square().sum())
        added += float((wanted - entrance).square().sum())
    return wrong / added if added > 0 else 0.0


def adam(block: nn.Module, family: Family, evidence: Evidence, rate: float) -> None:
    """One pass of Adam over the training batches, a sample at a time being too few for variances: a batch at a time."""
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    tuned = [_Tuned(parameter) for parameter in _parameters(block, family)]
    optimizer = torch.optim.Adam([one.change for one in tuned], lr=rate)
    for number in evidence.train:
        batch = evidence.entrance.batches[number]
        wanted = evidence.exits[batch.start : batch.stop].to(device_of(block))
        overrides = {id(one.parameter): one.value() for one in tuned}
        found = _run_with(block, evidence, number, overrides)
        optimizer.zero_grad()
        distance(found.float(), wanted.float()).backward()
        optimizer.step()
    with torch.no_grad():
        for one in tuned:
            one.parameter.copy_(one.value())


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """L_dist of two outputs [samples, tokens, width]: channel means and variances, per sample, averaged."""
    means = (found.mean(1) - wanted.mean(1)).abs()
    variances = (found.var(1, unbiased=False) - wanted.var(1, unbiased=False)).abs()
    return (means + variances).mean()


def closed_form(block: nn.Module, family: Family, evidence: Evidence) -> None:
    """Multiply each norm whose output only linears read by its least-squares factor."""
    for norm in norms(block, family):
        readers = [name for name in norm.readers if name in evidence.weights]
        known = next((name for name in readers if name in evidence.stats), None)
        if not norm.exclusive or known is None or evidence.stats[known].gram is None:
            continue
        pairs = [
            (evidence.weights[name].float(), weight_of(block.get_submodule(name)).float()) for name in readers
        ]
        gram = evidence.stats[known].gram
        assert gram is not None
        factor = least_squares_factor(gram, pairs)
        _scale_norm(block, norm.name, factor, family.gain_offset)


def least_squares_factor(
    gram: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], damping: float = CLOSED_DAMPING
) -> Tensor:
    """The factor [in] on inputs with `gram` [in, in] under which quantized weights best replace float ones.

    `pairs` are (float, quantized) weights [out, in] of all linears that read these inputs.
    """
    inner = sum((q.T @ q for _, q in pairs), torch.zeros_like(gram))
    cross = sum((w.T @ q for w, q in pairs), torch.zeros_like(gram))
    matrix = (gram * inner).double()
    size = float(matrix.diagonal().mean())
    if size <= 0:
        return torch.ones_like(gram[0])
    lam = damping * size
    matrix.diagonal().add_(lam)
    right = (gram * cross.T).sum(1).double() + lam
    found: Tensor = torch.linalg.solve(matrix, right)
    return found.float()


class _Tuned:
    """A norm's parameter times a learned factor, or plus a learned shift where it may be 0 (biases)."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.start = parameter.detach().float().clone()
        self.unit = self.start.abs().clamp(min=float(self.start.abs().mean()) * 0.1 + 1e-8)
        self.change = torch.zeros_like(self.start, requires_grad=True)

    def value(self) -> Tensor:
        """The parameter's present value, differentiable, in its own type."""
        return (self.start + self.change * self.unit).to(self.parameter.dtype)


def _run(block: nn.Module, evidence: Evidence, number: int) -> Tensor:
    hidden = evidence.entrance
    batch = hidden.batches[number]
    return forward(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index])


def _run_with(block: nn.Module, evidence: Evidence, number: int, values: Mapping[int, Tensor]) -> Tensor:
    """The block's output with some parameters replaced by differentiable values; the block itself is left as it is."""
    named = {name: values[id(p)] for name, p in block.named_parameters() if id(p) in values}
    places = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in named]
    held = [module._parameters.pop(leaf) for module, leaf in places]
    try:
        for (module, leaf), value in zip(places, named.values(), strict=True):
            object.__setattr__(module, leaf, value)
        return _run(block, evidence, number)
    finally:
        for (module, leaf), parameter in zip(places, held, strict=True):
            object.__delattr__(module, leaf)
            module._parameters[leaf] = parameter


def _parameters(block: nn.Module, family: Family) -> list[Tensor]:
    """Gains and biases of the block's norms."""
    found: list[Tensor] = []
    for norm in norms(block, family):
        module = block.get_submodule(norm.name)
        found += [parameter for _, parameter in module.named_parameters(recurse=False)]
    return found


def _scale_norm(block: nn.Module, name: str, factor: Tensor, offset: float) -> None:
    gain, bias = gain_of(block, name), bias_of(block.get_submodule(name))
    assert gain is not None
    with torch.no_grad():
        factor = factor.to(gain.device)
        gain.copy_((gain.float() + offset) * factor - offset)
        if bias is not None:
            bias.copy_(bias.float() * factor)


def _snapshot(block: nn.Module, family: Family) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(block, family)]


def _restore(block: nn.Module, family: Family, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(_parameters(block, family), tensors, strict=True):
            parameter.copy_(tensor)
