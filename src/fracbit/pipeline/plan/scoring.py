"""The earlier pass: everything that scores need of a model, ending in a JSON of floats. Allocations read nothing else.

What is measured once for all units: cosines of blocks, Gram matrices of inputs, gradients. What is measured unit by unit: the
oracle. Data-free scores read one weight at a time from the disk and never hold the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

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
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.pipeline.plan.sampling import Sampled, group_of, relative_error, sample_rows
from fracbit.pipeline.study.float_model import FloatModel, Weights, rounded
from fracbit.pipeline.study.variants import losses_of
from fracbit.records.progress import Progress
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
    weights: Weights | FloatModel,
    units: Sequence[Unit],
    method: str,
    scheme: Scheme | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit; larger is more important.

    `scheme` is the low level for scores that look at what quantizing does; `ids` int64 [samples, tokens] is the text of those
    that read some; a `FloatModel` is needed for these, `Weights` on disk are enough for the data-free ones.
    Raises `RecipeError` for a method without what it needs, `DataError`, `WeightError`.
    """
    found = score_method(method)
    name = method.removeprefix("reverse:")
    where = weights.weights if isinstance(weights, FloatModel) else weights
    protocol = {"seed": seed} | (
        {} if ids is None or found.data_free else {"samples": len(ids), "tokens": ids.numel()}
    )
    if found.of_scheme is not None:
        if scheme is None:
            raise RecipeError(
                f"score {name!r} looks at what a scheme does to a layer; name the low level, such as nf2/64"
            )
        losses = make_losses(weights, units, name, (scheme,), ids, seed, progress)
        values = {key: row[0] for key, row in losses.rows.items()}
        scores = Scores(values, name, losses.model, "order", {**losses.protocol, "scheme": str(scheme)})
    else:
        assert found.plain is not None
        plain = found.plain
        rows, sampled = _evaluate(weights, units, found, (), lambda view: (plain(view),), ids, seed, progress)
        values = {key: row[0] for key, row in rows.items()}
        scores = Scores(values, name, where.model, "order", protocol | sampled)
    return reverse(scores) if method.startswith("reverse:") else scores


def make_losses(
    weights: Weights | FloatModel,
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
    where = weights.weights if isinstance(weights, FloatModel) else weights
    if found.of_scheme is None:
        errors = make_losses(weights, units, "weight-error", schemes, progress=progress)
        return predict_losses(make_scores(weights, units, method, None, ids, seed, progress), errors)
    of_scheme = found.of_scheme
    rows, sampled = _evaluate(
        weights, units, found, tuple(schemes), lambda view: tuple(of_scheme(view, s) for s in schemes), ids, seed,
        progress,
    )  # fmt: skip
    protocol = {"seed": seed} | (
        {} if ids is None or found.data_free else {"samples": len(ids), "tokens": ids.numel()}
    )
    return Losses(tuple(schemes), rows, method, where.model, protocol | sampled)


def _evaluate(
    weights: Weights | FloatModel,
    units: Sequence[Unit],
    method: ScoreMethod,
    schemes: tuple[Scheme | None, ...],
    score: Callable[[LayerView], tuple[float, ...]],
    ids: Tensor | None,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, tuple[float, ...]], dict[str, Any]]:
    """Every unit's numbers; of a sampled unit the mean over the halves of its sample. And what was sampled, for a protocol."""
    rows: dict[str, tuple[float, ...]] = {}
    errors: list[float] = []
    seen = 0
    for views in _views(weights, units, method, schemes, ids, seed, progress):
        halves = [score(view) for view in views]
        rows[views[0].name] = tuple(sum(values) / len(values) for values in zip(*halves, strict=True))
        seen += sum(weight.numel() for view in views for weight in view.weights.values())
        errors += [relative_error(values) for values in zip(*halves, strict=True) if len(views) > 1]
    of = sum(unit.weights for unit in units)
    return rows, {"sampled": Sampled(seen, of, tuple(errors)).to_json()} if errors else {}


def _views(
    weights: Weights | FloatModel,
    units: Sequence[Unit],
    method: ScoreMethod,
    schemes: tuple[Scheme | None, ...],
    ids: Tensor | None,
    seed: int,
    progress: Progress | None,
) -> Iterator[tuple[LayerView, ...]]:
    """One unit after the other with what the method needs in it, its weights in memory: one view, or two halves of a sample."""
    step = progress or (lambda what, done, total: None)
    where = weights.weights if isinstance(weights, FloatModel) else weights
    found = Findings() if method.data_free else _find(weights, units, method, schemes, ids, step)
    for index, unit in enumerate(units):
        names = [name for name in unit.shapes if name not in unit.shared]
        block = f"{where.blocks}.{where.layers[names[0]].block}"
        view = LayerView(
            unit.name,
            index,
            len(units),
            {},
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
        held = _weights(where, unit, names, method, schemes)
        yield tuple(replace(view, weights=weights) for weights in held)
        step("scoring", index + 1, len(units))


def _weights(
    where: Weights, unit: Unit, names: Sequence[str], method: ScoreMethod, schemes: Sequence[Scheme | None]
) -> tuple[dict[str, Tensor], ...]:
    """What a score sees of a unit's weights: nothing, all of them, or two halves of a sample."""
    if "weights" not in method.needs:
        return ({},)
    group = group_of(schemes)
    if where.sample is not None and method.data_free and group is not None:
        shapes = {name: unit.shapes[name] for name in names}
        rows = sample_rows(shapes, group, where.sample)
        if rows is not None:
            return tuple({name: where.rows(name, rows[name][half]) for name in names} for half in (0, 1))
    return ({name: where.read(name) for name in names},)


def _find(
    weights: Weights | FloatModel,
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


def forward_pass(subject: FloatModel, ids: Tensor, gram: bool, final_norm: bool, step: Progress) -> Findings:
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


def _observed(subject: FloatModel, path: str, hidden: Hidden, stats: dict[str, Stats]) -> Hidden:
    block = subject.model.get_submodule(path)
    names = linears(block, subject.family)
    for name, module in names.items():
        stats[f"{path}.{name}"] = empty(weight_of(module).shape[1])

    def visit(name: str, x: Tensor) -> None:
        stats[f"{path}.{name}"] = add_inputs(stats[f"{path}.{name}"], x)

    return observe(block, hidden, names, visit)


def gradient_pass(
    subject: FloatModel,
    units: Sequence[Unit],
    schemes: tuple[Scheme | None, ...],
    ids: Tensor,
    step: Progress,
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
def _differentiable(subject: FloatModel, wanted: Sequence[torch.nn.Parameter]) -> Iterator[None]:
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
    subject: FloatModel, units: Sequence[Unit], schemes: Sequence[Scheme | None], ids: Tensor, step: Progress
) -> dict[tuple[str, Scheme | None], float]:
    """The oracle: change of the loss in nats per token with one unit rounded under one scheme, all others float.

    The states at the entrance of a unit's block are those of the float model, computed once (variants.py).
    """
    by_block: list[list[tuple[Unit, Scheme]]] = [[] for _ in blocks(subject.model, subject.family)]
    for unit in units:
        # Where a tensor is shared, the earliest block that reads it is the first that changes.
        first = min(subject.weights.layers[name].block or 0 for name in unit.shapes)
        by_block[first] += [(unit, scheme) for scheme in schemes if scheme is not None]
    floats = (0,) * len(by_block)
    alone = {
        (*floats[:block], number, *floats[block + 1 :]): pair
        for block, pairs in enumerate(by_block)
        for number, pair in enumerate(pairs, 1)
    }

    def option(block: int, number: int) -> dict[str, Tensor]:
        if number == 0:
            return {}
        unit, scheme = by_block[block][number - 1]
        own = (name for name in unit.shapes if name not in unit.shared)
        return rounded(subject, dict.fromkeys(own, scheme))

    losses = {}
    for these, nats in losses_of(subject, [floats, *alone], option, ids):
        losses[these] = float(nats.mean())
        step("oracle", len(losses), len(alone) + 1)
    changes: dict[tuple[str, Scheme | None], float] = {(unit.name, None): 0.0 for unit in units}
    return changes | {
        (unit.name, scheme): losses[these] - losses[floats] for these, (unit, scheme) in alone.items()
    }
