"""Passes over a float model in memory. They measure what scores read: cosines, Gram matrices, gradients, loss changes.

Each pass measures all units at once, except the oracle, which measures one unit after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.importance import Unit, cosine_sum, error_of, guided_error
from fracbit.models.backward import Stack, gradient_squares, resident
from fracbit.models.blocks import blocks, linears, weight_of
from fracbit.models.walk import Hidden, advance, embed, observe
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.pipeline.quantize.observe import Observer
from fracbit.pipeline.study.float_model import FloatModel, rounded
from fracbit.pipeline.study.variants import losses_of
from fracbit.pipeline.study.weights import Weights
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme

UnitScheme: TypeAlias = tuple[str, Scheme | None]
"""A unit's name and a scheme that it could get."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Results of the passes over a model; empty if no score needs them.

    - `cosines`: path of a block -> mean cosine of its input and output; `stats`: linear -> inputs that it saw.
    - `gradients`: linear -> [out, in], of the mean loss; `slopes`: -> [samples], derivatives along a scheme's error.
    - `sample_tokens`: tokens in a sample's mean loss; `changes`: -> nats per token that a scheme costs.
    """

    cosines: Mapping[str, float] = field(default_factory=dict)
    stats: Mapping[str, Stats] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    slopes: Mapping[UnitScheme, Tensor] = field(default_factory=dict)
    sample_tokens: int = 0
    changes: Mapping[UnitScheme, float] = field(default_factory=dict)


def forward_pass(
    float_model: FloatModel, ids: Tensor, gram: bool, final_norm: bool, step: Progress
) -> Findings:
    """Walk the blocks once: cosine of each block's raw input and output, and the inputs of its linears when `gram`.

    `ids` int64 [samples, tokens]; `final_norm`: the last block's output is read after the model's final norm.
    """
    stack = blocks(float_model.model, float_model.family)
    hidden = embed(float_model.model, float_model.family, ids)
    cosines: dict[str, float] = {}
    stats: dict[str, Stats] = {}
    for index, (path, block) in enumerate(stack):
        entering = hidden
        hidden = _observed(float_model, path, entering, stats) if gram else advance(block, entering)
        leaving = hidden.states  # [samples, tokens, width]
        if final_norm and index == len(stack) - 1 and float_model.family.final_norm:
            with torch.no_grad():
                leaving = float_model.model.get_submodule(float_model.family.final_norm)(leaving)
        total, count = cosine_sum(entering.states, leaving)
        cosines[path] = total / count
        step("walking", index + 1, len(stack))
    return Findings(cosines, stats)


def _observed(float_model: FloatModel, path: str, hidden: Hidden, stats: dict[str, Stats]) -> Hidden:
    """Run a block and add the inputs of its linears to `stats`."""
    block = float_model.model.get_submodule(path)
    names = linears(block, float_model.family)
    for name, module in names.items():
        stats[f"{path}.{name}"] = empty(weight_of(module).shape[1])

    def visit(name: str, x: Tensor) -> None:  # x [tokens, in]
        stats[f"{path}.{name}"] = add_inputs(stats[f"{path}.{name}"], x)

    return observe(block, hidden, names, visit)


def gradient_pass(
    float_model: FloatModel,
    units: Sequence[Unit],
    schemes: Sequence[Scheme | None],
    ids: Tensor,
    step: Progress,
) -> Findings:
    """One backward pass per sample: the mean gradient of every linear, and derivatives along the errors of `schemes`.

    `ids` int64 [samples, tokens]. Memory: the gradients, and one copy of the weights for each scheme.
    """
    # What is summed up: mean gradients [out, in] of linears, and slopes [samples] of units under schemes.
    unit_of = {name: unit.name for unit in units for name in unit.own}
    mean = {name: torch.zeros_like(float_model.weights.read(name)) for name in unit_of}
    keys = [(unit.name, scheme) for unit in units for scheme in schemes]
    slopes = {key: torch.zeros(len(ids), dtype=torch.float64) for key in keys}
    errors = {(name, s): error_of(float_model.weights.read(name), s) for name in unit_of for s in schemes}
    # One sample after the other.
    parameters = {name: float_model.module(name).get_parameter("weight") for name in unit_of}
    with _differentiable(float_model, parameters.values()):
        for sample, row in enumerate(ids.to(float_model.model.device)):  # row [tokens]
            for name, grad in _gradients(float_model, parameters, row).items():
                mean[name] += grad.float() / len(ids)
                for scheme in schemes:
                    along = (grad * errors[name, scheme]).double().sum()
                    slopes[unit_of[name], scheme][sample] += float(along)
            step("gradients", sample + 1, len(ids))
    return Findings(gradients=mean, slopes=slopes, sample_tokens=ids.shape[1] - 1)


def _gradients(
    float_model: FloatModel, parameters: Mapping[str, torch.nn.Parameter], row: Tensor
) -> dict[str, Tensor]:
    """The gradients [out, in] of the mean loss of one sample, `row` int64 [tokens], by linear."""
    loss = float_model.model(input_ids=row[None], labels=row[None]).loss
    grads = zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    return {name: grad.T if float_model.weights.layers[name].transposed else grad for name, grad in grads}


@dataclass(frozen=True, eq=False)
class Streamed:
    """A float model that need not be in memory as a whole: its linears, its blocks in turn, and how it embeds `ids`."""

    weights: Weights
    stack: Stack
    ids: Tensor
    embed: Callable[[], Hidden]


def in_memory(float_model: FloatModel, ids: Tensor) -> Streamed:
    """A model that is in memory anyway."""
    model, family = float_model.model, float_model.family
    return Streamed(float_model.weights, resident(model, family), ids, lambda: embed(model, family, ids))


def guided_pass(
    where: Streamed, units: Sequence[Unit], schemes: Sequence[Scheme | None], step: Progress
) -> Findings:
    """The loss that the errors of each unit's linears add, block by block: one backward pass, then one forwards.

    Tokens are weighed by the mean squared gradient at a linear's outputs: the error of its outputs is in nats per token.
    """
    hidden, ids = where.embed(), where.ids
    squares = gradient_squares(where.stack, hidden, ids, step)
    unit_of = {name: unit.name for unit in units for name in unit.own}
    changes = {(unit.name, scheme): 0.0 for unit in units for scheme in schemes}
    for number, path in enumerate(where.stack.paths):
        with where.stack.loaded(number) as block:
            full = {name: f"{path}.{name}" for name in linears(block, where.stack.family)}
            # Experts that no token was routed to have no gradients, and cost nothing.
            weights = {
                name: squares[full[name]] for name in full if full[name] in unit_of and full[name] in squares
            }
            observer = Observer(path, gram=True, length=ids.shape[1], weights=weights)
            hidden = observe(block, hidden, list(weights), observer)
            for name, stats in observer.stats.items():
                weight = weight_of(block.get_submodule(name)).float()  # [out, in]
                for scheme in schemes:
                    changes[unit_of[full[name]], scheme] += guided_error(weight, stats, scheme) / ids.numel()
        step("errors of the outputs", number + 1, len(where.stack.paths))
    return Findings(changes=changes)


@contextmanager
def _differentiable(float_model: FloatModel, wanted: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A context in which exactly these parameters require gradients; the model's flags are restored afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in float_model.model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def ablation(
    float_model: FloatModel,
    units: Sequence[Unit],
    schemes: Sequence[Scheme | None],
    ids: Tensor,
    step: Progress,
) -> dict[UnitScheme, float]:
    """The oracle: change of the loss in nats per token with one unit rounded under one scheme, all others float.

    `ids` int64 [samples, tokens]. The states that enter a unit's block are those of the float model, computed once
    (variants.py).
    """
    # Number the options of each block; 0 leaves it float.
    tried: list[list[tuple[Unit, Scheme]]] = [[] for _ in blocks(float_model.model, float_model.family)]
    for unit in units:
        # Where a tensor is shared, the earliest block that reads it is the first that changes.
        first = min(float_model.weights.layers[name].block or 0 for name in unit.shapes)
        tried[first] += [(unit, scheme) for scheme in schemes if scheme is not None]
    floats = (0,) * len(tried)
    alone = {
        (*floats[:block], number, *floats[block + 1 :]): pair
        for block, pairs in enumerate(tried)
        for number, pair in enumerate(pairs, 1)
    }

    def option(block: int, number: int) -> dict[str, Tensor]:
        if number == 0:
            return {}
        unit, scheme = tried[block][number - 1]
        return rounded(float_model, dict.fromkeys(unit.own, scheme))

    # Measure the float model and each of these.
    losses = {}
    for these, nats in losses_of(float_model, [floats, *alone], option, ids):
        losses[these] = float(nats.mean())
        step("oracle", len(losses), len(alone) + 1)
    # What each costs; staying float costs nothing.
    changes: dict[UnitScheme, float] = {(unit.name, None): 0.0 for unit in units}
    return changes | {
        (unit.name, scheme): losses[these] - losses[floats] for these, (unit, scheme) in alone.items()
    }
