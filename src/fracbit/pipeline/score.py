"""The earlier pass: everything that scores need of a model, ending in a JSON of floats. Allocations read nothing else.

What is measured once for all units: cosines of blocks, Gram matrices of inputs, gradients. What is measured unit by unit: the
oracle. Data-free scores read one weight at a time from the disk and never hold the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fracbit.errors import DataError, RecipeError
from fracbit.importance import (
    LayerView,
    ScoreMethod,
    Unit,
    cosine_sum,
    error_of,
    predict_losses,
    reverse,
    score_method,
)
from fracbit.models.blocks import blocks, linears, weight_of
from fracbit.models.walk import Hidden, advance, embed, observe
from fracbit.numerics.stats import Stats, empty
from fracbit.numerics.stats import observe as add_inputs
from fracbit.pipeline.subject import Progress, Subject, Weights, measure, replaced, rounded
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores


@dataclass(frozen=True, eq=False)
class Findings:
    """What the passes over a model found; empty where nothing asked."""

    cosines: Mapping[str, float] = field(default_factory=dict)
    stats: Mapping[str, Stats] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    slopes: Mapping[tuple[str, Scheme | None], Tensor] = field(default_factory=dict)
    sample_tokens: int = 0
    changes: Mapping[tuple[str, Scheme | None], float] = field(default_factory=dict)


def make_scores(
    weights: Weights | Subject,
    units: Sequence[Unit],
    method: str,
    scheme: Scheme | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit; larger is more important.

    `scheme` is the low level for scores that look at what quantizing does; `ids` int64 [samples, tokens] is the text of those
    that read some; a `Subject` is needed for these, `Weights` on disk are enough for the data-free ones.
    Raises `RecipeError` for a method without what it needs, `DataError`, `WeightError`.
    """
    found = score_method(method)
    name = method.removeprefix("reverse:")
    where = weights.weights if isinstance(weights, Subject) else weights
    protocol = {"seed": seed} | (
        {} if ids is None or found.data_free else {"samples": len(ids), "tokens": ids.numel()}
    )
    if found.of_scheme is not None:
        if scheme is None:
            raise RecipeError(
                f"score {name!r} looks at what a scheme does to a layer; name the low level, such as nf2/64"
            )
        losses = make_losses(weights, units, name, (scheme,), ids, seed, progress)
        scores = Scores(
            {key: row[0] for key, row in losses.rows.items()}, name, losses.model, "order", losses.protocol
        )
    else:
        assert found.plain is not None
        views = _views(weights, units, found, (), ids, seed, progress)
        scores = Scores(
            {view.name: found.plain(view) for view in views}, name, where.model, "order", protocol
        )
    return reverse(scores) if method.startswith("reverse:") else scores


def make_losses(
    weights: Weights | Subject,
    units: Sequence[Unit],
    method: str,
    schemes: Sequence[Scheme | None],
    ids: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Losses:
    """Predict the loss of every unit under every scheme; arguments and errors as `make_scores`.

    A score that does not know schemes weights each scheme's relative squared error (`importance.predict_losses`).
    """
    found = score_method(method)
    where = weights.weights if isinstance(weights, Subject) else weights
    if found.of_scheme is None:
        errors = make_losses(weights, units, "weight-error", schemes, progress=progress)
        return predict_losses(make_scores(weights, units, method, None, ids, seed, progress), errors)
    rows = {}
    for view in _views(weights, units, found, tuple(schemes), ids, seed, progress):
        rows[view.name] = tuple(found.of_scheme(view, scheme) for scheme in schemes)
    protocol = {"seed": seed} | (
        {} if ids is None or found.data_free else {"samples": len(ids), "tokens": ids.numel()}
    )
    return Losses(tuple(schemes), rows, method, where.model, protocol)


def _views(
    weights: Weights | Subject,
    units: Sequence[Unit],
    method: ScoreMethod,
    schemes: tuple[Scheme | None, ...],
    ids: Tensor | None,
    seed: int,
    progress: Progress | None,
) -> Iterator[LayerView]:
    """One view after the other with what the method needs in it; the weights of one unit at a time are in memory."""
    step = progress or (lambda what, done, total: None)
    where = weights.weights if isinstance(weights, Subject) else weights
    found = Findings() if method.data_free else _find(weights, units, method, schemes, ids, step)
    for index, unit in enumerate(units):
        names = [name for name in unit.shapes if name not in unit.shared]
        block = f"{where.blocks}.{where.layers[names[0]].block}"
        yield LayerView(
            unit.name,
            index,
            len(units),
            {name: where.read(name) for name in names} if "weights" in method.needs else {},
            {name: found.stats[name] for name in names if name in found.stats},
            {name: found.gradients[name] for name in names if name in found.gradients},
            {
                scheme: found.slopes[unit.name, scheme]
                for scheme in schemes
                if (unit.name, scheme) in found.slopes
            },
            found.sample_tokens,
            found.cosines.get(block),
            {
                scheme: found.changes[unit.name, scheme]
                for scheme in schemes
                if (unit.name, scheme) in found.changes
            },
            seed,
        )
        step("scoring", index + 1, len(units))


def _find(
    weights: Weights | Subject,
    units: Sequence[Unit],
    method: ScoreMethod,
    schemes: tuple[Scheme | None, ...],
    ids: Tensor | None,
    step: Progress,
) -> Findings:
    if ids is None or isinstance(weights, Weights):
        raise RecipeError(
            f"this score ({method.about}) reads text; name one with --text, or take a data-free score such as zd"
        )
    if ids.dim() != 2 or ids.numel() == 0:
        raise DataError(f"scores take token ids [samples, tokens], got the shape {tuple(ids.shape)}")
    if "loss" in method.needs:
        return Findings(changes=ablation(weights, units, schemes, ids, step))
    if method.needs & {"gradients", "slopes"}:
        return gradient_pass(weights, units, schemes if "slopes" in method.needs else (), ids, step)
    return forward_pass(
        weights, ids, "gram" in method.needs, "cosine behind the final norm" in method.needs, step
    )


def forward_pass(subject: Subject, ids: Tensor, gram: bool, final_norm: bool, step: Progress) -> Findings:
    """Walk the blocks once: cosine of each block's raw input and output, and the inputs of its linears when `gram`.

    `final_norm`: the last block's output is read behind the model's final norm.
    """
    stack = blocks(subject.model, subject.family)
    hidden = embed(subject.model, subject.family, ids)
    cosines: dict[str, float] = {}
    stats: dict[str, Stats] = {}
    for index, (path, block) in enumerate(stack):
        entering = hidden
        hidden = _observed(subject, path, entering, stats) if gram else advance(block, entering)
        leaving = hidden.states
        if final_norm and index == len(stack) - 1 and subject.family.final_norm:
            with torch.no_grad():
                leaving = subject.model.get_submodule(subject.family.final_norm)(leaving)
        total, count = cosine_sum(entering.states, leaving)
        cosines[path] = total / count
        step("walking", index + 1, len(stack))
    return Findings(cosines, stats)


def _observed(subject: Subject, path: str, hidden: Hidden, stats: dict[str, Stats]) -> Hidden:
    block = subject.model.get_submodule(path)
    names = linears(block, subject.family)
    for name, module in names.items():
        stats[f"{path}.{name}"] = empty(weight_of(module).shape[1])

    def visit(name: str, x: Tensor) -> None:
        stats[f"{path}.{name}"] = add_inputs(stats[f"{path}.{name}"], x)

    return observe(block, hidden, names, visit)


def gradient_pass(
    subject: Subject, units: Sequence[Unit], schemes: tuple[Scheme | None, ...], ids: Tensor, step: Progress
) -> Findings:
    """One backward pass a sample: the mean gradient of every linear, and derivatives along the errors of `schemes`.

    Memory: the gradients, and with schemes one more copy of the weights for each of them.
    """
    names = [name for unit in units for name in unit.shapes if name not in unit.shared]
    unit_of = {name: unit.name for unit in units for name in unit.shapes}
    errors = {
        (name, scheme): error_of(subject.weights.read(name), scheme) for name in names for scheme in schemes
    }
    parameters = {name: subject.module(name).get_parameter("weight") for name in names}
    mean = {name: torch.zeros_like(subject.weights.read(name)) for name in names}
    slopes = {
        (unit.name, scheme): torch.zeros(len(ids), dtype=torch.float64)
        for unit in units
        for scheme in schemes
    }
    with _differentiable(subject, list(parameters.values())):
        for sample, row in enumerate(ids):
            loss = subject.model(
                input_ids=row[None].to(subject.model.device), labels=row[None].to(subject.model.device)
            ).loss
            grads = torch.autograd.grad(loss, list(parameters.values()))
            for name, grad in zip(names, grads, strict=True):
                grad = grad.T if subject.weights.layers[name].transposed else grad
                mean[name] += grad.float() / len(ids)
                for scheme in schemes:
                    slopes[unit_of[name], scheme][sample] += float(
                        (grad * errors[name, scheme]).double().sum()
                    )
            step("gradients", sample + 1, len(ids))
    return Findings(gradients=mean, slopes=slopes, sample_tokens=ids.shape[1] - 1)


@contextmanager
def _differentiable(subject: Subject, wanted: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, exactly these parameters ask for gradients; the model's own flags come back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in subject.model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def ablation(
    subject: Subject, units: Sequence[Unit], schemes: Sequence[Scheme | None], ids: Tensor, step: Progress
) -> dict[tuple[str, Scheme | None], float]:
    """The oracle: change of the loss in nats per token with one unit rounded under one scheme, all others float."""
    base = measure(subject, ids).nll
    changes: dict[tuple[str, Scheme | None], float] = {}
    for done, unit in enumerate(units):
        for scheme in schemes:
            changes[unit.name, scheme] = 0.0
            if scheme is not None:
                alone = dict.fromkeys((name for name in unit.shapes if name not in unit.shared), scheme)
                with replaced(subject, rounded(subject, alone)):
                    changes[unit.name, scheme] = measure(subject, ids).nll - base
        step("oracle", done + 1, len(units))
    return changes
