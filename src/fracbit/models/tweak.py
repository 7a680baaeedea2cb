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

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fracbit.models.blocks import bias_of, gain_of, norms, weight_of
from fracbit.models.calls import device_of
from fracbit.models.correction import Evidence, Tweaked, error, run_batch
from fracbit.models.family import Family

LEARNING_RATE = 1e-3  # of the factor on a gain, per step
DEPTH_SCALE = 1.0
CLOSED_DAMPING = 0.01
Variant: TypeAlias = Callable[[nn.Module, Family, Evidence], None]


def closed(block: nn.Module, family: Family, evidence: Evidence, depth: float) -> Tweaked:
    """The closed form."""
    return _tweaked(block, family, evidence, {"closed": closed_form})


def adam(block: nn.Module, family: Family, evidence: Evidence, depth: float) -> Tweaked:
    """One pass of Adam; its rate grows with `depth`."""
    return _tweaked(block, family, evidence, {"adam": _adam_at(depth)})


def auto(block: nn.Module, family: Family, evidence: Evidence, depth: float) -> Tweaked:
    """The better of both, or neither."""
    variants = {"closed": closed_form, "adam": _adam_at(depth)}
    return _tweaked(block, family, evidence, variants, or_none=True)


def _tweaked(
    block: nn.Module,
    family: Family,
    evidence: Evidence,
    variants: Mapping[str, Variant],
    or_none: bool = False,
) -> Tweaked:
    """Move the norms of `block` by the variant of least error, or not at all where none lowers it and `or_none` says so."""
    start = _snapshot(block, family)
    before = error(block, evidence)
    tried: dict[str, tuple[float, list[Tensor]]] = {}
    for name, move in variants.items():
        move(block, family, evidence)
        tried[name] = error(block, evidence), _snapshot(block, family)
        _restore(block, family, start)
    best = min(tried, key=lambda name: tried[name][0])
    after, tensors = tried[best]
    if or_none and not after < before:
        return Tweaked(before, before, "none")
    _restore(block, family, tensors)
    return Tweaked(before, after, best)


def _adam_at(depth: float) -> Variant:
    rate = LEARNING_RATE * (1 + DEPTH_SCALE * depth)
    return lambda block, family, evidence: fit_by_adam(block, family, evidence, rate)


def fit_by_adam(block: nn.Module, family: Family, evidence: Evidence, rate: float) -> None:
    """One pass of Adam over the training batches, a sample at a time being too few for variances: a batch at a time."""
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    tuned = [_Tuned(parameter) for parameter in _parameters(block, family)]
    optimizer = torch.optim.Adam([one.change for one in tuned], lr=rate)
    for number in evidence.train:
        batch = evidence.entrance.batches[number]
        wanted = evidence.exits[batch.start : batch.stop].to(device_of(block))  # [batch, tokens, width]
        overrides = {id(one.parameter): one.value() for one in tuned}
        found = _run_with(block, evidence, number, overrides)  # [batch, tokens, width]
        optimizer.zero_grad()
        distance(found.float(), wanted.float()).backward()
        optimizer.step()
    with torch.no_grad():
        for one in tuned:
            one.parameter.copy_(one.value())


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """L_dist of two outputs [samples, tokens, width]: channel means and variances, per sample, averaged."""
    means = (found.mean(1) - wanted.mean(1)).abs()  # [samples, width]
    variances = (found.var(1, unbiased=False) - wanted.var(1, unbiased=False)).abs()  # [samples, width]
    return (means + variances).mean()


def closed_form(block: nn.Module, family: Family, evidence: Evidence) -> None:
    """Multiply each norm that only linears read by its least-squares factor."""
    for norm in norms(block, family):
        readers = [name for name in norm.readers if name in evidence.weights]
        known = next((name for name in readers if name in evidence.stats), None)
        if not norm.exclusive or known is None or evidence.stats[known].gram is None:
            continue
        pairs = [
            (evidence.weights[name].float(), weight_of(block.get_submodule(name)).float()) for name in readers
        ]
        gram = evidence.stats[known].gram  # [width, width]
        assert gram is not None
        factor = least_squares_factor(gram, pairs)  # [width]
        _scale_norm(block, norm.name, factor, family.gain_offset)


def least_squares_factor(
    gram: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], damping: float = CLOSED_DAMPING
) -> Tensor:
    """The factor [in] on inputs with `gram` [in, in] under which quantized weights best replace float ones.

    `pairs` are (float, quantized) weights [out, in] of all linears that read these inputs.
    """
    inner = sum((q.T @ q for _, q in pairs), torch.zeros_like(gram))  # [in, in]
    cross = sum((w.T @ q for w, q in pairs), torch.zeros_like(gram))  # [in, in]
    matrix = (gram * inner).double()  # [in, in]
    size = float(matrix.diagonal().mean())
    if size <= 0:
        return torch.ones_like(gram[0])
    lam = damping * size
    matrix.diagonal().add_(lam)
    right = (gram * cross.T).sum(1).double() + lam  # [in]
    found: Tensor = torch.linalg.solve(matrix, right)  # [in]
    return found.float()


class _Tuned:
    """A norm's parameter times a learned factor, or plus a learned shift where it may be 0 (biases)."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.start = parameter.detach().float().clone()  # [width]
        self.unit = self.start.abs().clamp(min=float(self.start.abs().mean()) * 0.1 + 1e-8)  # [width]
        self.change = torch.zeros_like(self.start, requires_grad=True)  # [width], in units of `unit`

    def value(self) -> Tensor:
        """The parameter's present value, differentiable, in its own type."""
        return (self.start + self.change * self.unit).to(self.parameter.dtype)


def _run_with(block: nn.Module, evidence: Evidence, number: int, values: Mapping[int, Tensor]) -> Tensor:
    """The block's output with some parameters replaced by differentiable values; the block itself does not change."""
    named = {name: values[id(p)] for name, p in block.named_parameters() if id(p) in values}
    places = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in named]
    held = [module._parameters.pop(leaf) for module, leaf in places]
    try:
        for (module, leaf), value in zip(places, named.values(), strict=True):
            object.__setattr__(module, leaf, value)
        return run_batch(block, evidence, number)
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
    gain, bias = gain_of(block, name), bias_of(block.get_submodule(name))  # [width] each
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
