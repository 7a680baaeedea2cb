"""Scores of units, measured before an allocation and stored as JSON. Allocations read nothing else.

    method -> what it needs (passes.py) -> a view of each unit -> one float per unit, or per unit and scheme

Data-free scores read one weight at a time from disk and never hold the model. They read a sample of large weights'
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.opened import open_float
from fracbit.errors import DataError, RecipeError
from fracbit.importance import IN_TURN, LayerView, ScoreMethod, Unit, predict_losses, reverse, score_method
from fracbit.models.attention import native_attention
from fracbit.pipeline.plan.passes import (
    Findings,
    Streamed,
    ablation,
    forward_pass,
    gradient_pass,
    guided_pass,
    in_memory,
)
from fracbit.pipeline.plan.sampling import Sampled, group_of, relative_error, sample_rows
from fracbit.pipeline.plan.streamed import streamed
from fracbit.pipeline.study.float_model import FloatModel
from fracbit.pipeline.study.study import Study
from fracbit.pipeline.study.texts import seen_by
from fracbit.pipeline.study.weights import Weights, weights_on_disk
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores
from fracbit.records.spending import LENGTH, SAMPLES, Granularity
from fracbit.records.text_source import check_source

LOW = "int2z/64"
WEIGHT_ERROR = "weight-error"


def score(
    model: str | Path,
    method: str,
    *,
    levels: str | Sequence[Scheme | str | None] | None = None,
    low: str | Scheme | None = LOW,
    granularity: Granularity = "block",
    fused: bool = False,
    whole: bool = False,
    text: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Scores | Losses:
    """Score every block or linear of a float model, a folder or a hub id; larger is more important.

    - `method`: a score of the table `SCORES`; `reverse:NAME` reverses its order.
    - `low`: the scheme, or its word, for scores that depend on one. `levels`: return losses under each of these instead.
    - `granularity`, `fused`: what is scored; `whole`: read all rows of large weights, not a sample.
    - `text`: for scores that read text; `samples` of `length` ids are drawn from it with `seed`.
    - `trust_remote_code`: run the model's own code.

    The result goes into `Spending(score=...)`, or as JSON into `--score`.
    Raises `RecipeError` for an unknown score or one without its text, `SchemeError`, `SourceError`, `DataError`.
    """
    data_free = score_method(method).data_free
    schemes, lowest = None if levels is None else read_levels(levels), read_level(low)
    if text is not None and not data_free:
        check_source(text, written=True)
    with showing(progress) as show:
        study = Study(open_float(model, trust_remote_code=trust_remote_code), seed, show)
        where: Weights | FloatModel | Streamed = weights_on_disk(study.opened, whole)
        drawn = None
        if text is not None and not data_free:
            drawn = study.seen(text, samples, length)
            where = model_for(method, study, drawn.ids)
        ids = None if drawn is None else drawn.ids
        units = weights_of(where).units(granularity, fused)
        found: Scores | Losses
        if schemes is None:
            found = make_scores(where, units, method, scheme=lowest, ids=ids, seed=seed, progress=show)
        else:
            found = make_losses(where, units, method, schemes, ids=ids, seed=seed, progress=show)
        return found if drawn is None else replace(found, protocol={**found.protocol, "text": seen_by(drawn)})


def model_for(method: str, study: Study, ids: Tensor) -> FloatModel | Streamed:
    """What a score of `ids` [samples, tokens] looks at: blocks in turn where that is enough, else the whole model in memory."""
    if score_method(method).needs <= IN_TURN:
        return streamed(study.opened, ids, study.device)
    return study.float_model


def make_scores(
    model: Weights | FloatModel | Streamed,
    units: Sequence[Unit],
    method: str,
    scheme: Scheme | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit; larger is more important.

    `scheme`: the low level, for scores that depend on a scheme; `ids` int64 [samples, tokens]: the text, for scores
    that read text. These need a `FloatModel`, or a `Streamed` one if they look at one block at a time; `Weights` on disk
    are enough for data-free scores.
    Raises `RecipeError` for a method without what it needs, `DataError`, `WeightError`.
    """
    found, name = score_method(method), method.removeprefix("reverse:")
    if found.of_scheme is not None:
        if scheme is None:
            raise RecipeError(f"score {name!r} depends on a scheme; name the low level, such as nf2/64")
        losses = make_losses(model, units, name, (scheme,), ids=ids, seed=seed, progress=progress)
        values = {unit: row[0] for unit, row in losses.rows.items()}
        protocol = {**losses.protocol, "scheme": str(scheme)}
        scores = Scores(values, name, losses.model, "order", protocol=protocol)
    else:
        assert found.plain is not None
        plain = found.plain
        job = _Job(model, units, found, (), ids=ids, seed=seed, progress=progress)
        rows, protocol = _evaluate(job, lambda view: (plain(view),))
        values = {unit: row[0] for unit, row in rows.items()}
        scores = Scores(values, name, job.weights.fingerprint, "order", protocol=protocol)
    return reverse(scores) if method.startswith("reverse:") else scores


def make_losses(
    model: Weights | FloatModel | Streamed,
    units: Sequence[Unit],
    method: str,
    schemes: Sequence[Scheme | None],
    ids: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Losses:
    """Predict the loss of every unit under every scheme; arguments and errors as `make_scores`.

    A score that does not depend on a scheme weights the relative squared error of each (`importance.predict_losses`).
    """
    found = score_method(method)
    if found.of_scheme is None:
        errors = make_losses(model, units, WEIGHT_ERROR, schemes, progress=progress)
        scores = make_scores(model, units, method, ids=ids, seed=seed, progress=progress)
        return predict_losses(scores, errors)
    of_scheme = found.of_scheme
    job = _Job(model, units, found, tuple(schemes), ids=ids, seed=seed, progress=progress)
    rows, protocol = _evaluate(job, lambda view: tuple(of_scheme(view, scheme) for scheme in schemes))
    return Losses(job.schemes, rows, method, job.weights.fingerprint, protocol=protocol)


def weights_of(model: Weights | FloatModel | Streamed) -> Weights:
    """The linears of a model."""
    return model if isinstance(model, Weights) else model.weights


@dataclass(frozen=True, eq=False)
class _Job:
    """What is scored, by which method, under which schemes, on which text."""

    model: Weights | FloatModel | Streamed
    units: Sequence[Unit]
    method: ScoreMethod
    schemes: tuple[Scheme | None, ...]
    ids: Tensor | None
    seed: int
    progress: Progress | None

    @property
    def weights(self) -> Weights:
        return weights_of(self.model)

    def step(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def _evaluate(
    job: _Job, score: Callable[[LayerView], tuple[float, ...]]
) -> tuple[dict[str, tuple[float, ...]], dict[str, Any]]:
    """The numbers of every unit (for a sampled unit, the mean over the halves of its sample), and the protocol."""
    rows: dict[str, tuple[float, ...]] = {}
    errors: list[float] = []
    seen = 0
    for views in _views(job):
        halves = [score(view) for view in views]
        rows[views[0].name] = tuple(sum(values) / len(values) for values in zip(*halves, strict=True))
        seen += sum(weight.numel() for view in views for weight in view.weights.values())
        errors += [relative_error(values) for values in zip(*halves, strict=True) if len(views) > 1]
    protocol: dict[str, Any] = {"seed": job.seed}
    if job.ids is not None and not job.method.data_free:
        protocol |= {"samples": len(job.ids), "tokens": job.ids.numel()}
    if errors:
        of = sum(unit.weights for unit in job.units)
        protocol["sampled"] = Sampled(seen, of, tuple(errors)).to_json()
    return rows, protocol


def _views(job: _Job) -> Iterator[tuple[LayerView, ...]]:
    """Each unit with its weights in memory and what the method needs: one view, or one for each half of its sample."""
    found = Findings() if job.method.data_free else _find(job)
    for index, unit in enumerate(job.units):
        view = _view(job, found, index, unit)
        yield tuple(replace(view, weights=weights) for weights in _weights(job, unit))
        job.step("scoring", index + 1, len(job.units))


def _view(job: _Job, found: Findings, index: int, unit: Unit) -> LayerView:
    """Everything that was measured for one unit."""
    names, schemes = unit.own, job.schemes
    return LayerView(
        unit.name,
        index,
        len(job.units),
        stats={name: found.stats[name] for name in names if name in found.stats},
        gradients={name: found.gradients[name] for name in names if name in found.gradients},
        slopes={s: found.slopes[unit.name, s] for s in schemes if (unit.name, s) in found.slopes},
        sample_tokens=found.sample_tokens,
        cosine=found.cosines.get(f"{job.weights.blocks}.{job.weights.layers[names[0]].block}"),
        loss_change={s: found.changes[unit.name, s] for s in schemes if (unit.name, s) in found.changes},
        seed=job.seed,
    )


def _weights(job: _Job, unit: Unit) -> tuple[dict[str, Tensor], ...]:
    """The weights of a unit that a score reads: none, all of them, or two halves of a sample of their rows."""
    where = job.weights
    if "weights" not in job.method.needs:
        return ({},)
    group = group_of(job.schemes)
    if where.sample is not None and job.method.data_free and group is not None:
        rows = sample_rows({name: unit.shapes[name] for name in unit.own}, group, where.sample)
        if rows is not None:
            return tuple({name: where.rows(name, rows[name][half]) for name in unit.own} for half in (0, 1))
    return ({name: where.read(name) for name in unit.own},)


def _find(job: _Job) -> Findings:
    """The pass over the model that the method needs."""
    float_model, ids, needs = job.model, job.ids, job.method.needs
    if ids is None or isinstance(float_model, Weights):
        raise RecipeError(
            f"this score ({job.method.about}) reads text; name one with --text, or take a data-free score such as zd"
        )
    if ids.dim() != 2 or ids.numel() == 0:
        raise DataError(f"scores take token ids [samples, tokens], got the shape {tuple(ids.shape)}")
    if "guided errors" in needs:
        where = float_model if isinstance(float_model, Streamed) else in_memory(float_model, ids)
        with native_attention(where.stack.model):
            return guided_pass(where, job.units, job.schemes, step=job.step)
    if isinstance(float_model, Streamed):
        raise RecipeError(
            f"this score ({job.method.about}) needs the whole model in memory: pass a FloatModel"
        )
    if "loss" in needs:
        return Findings(changes=ablation(float_model, job.units, job.schemes, ids, step=job.step))
    if needs & {"gradients", "slopes"}:
        schemes = job.schemes if "slopes" in needs else ()
        return gradient_pass(float_model, job.units, schemes, ids, step=job.step)
    final_norm = "cosine behind the final norm" in needs
    with native_attention(float_model.model):
        return forward_pass(float_model, ids, gram="gram" in needs, final_norm=final_norm, step=job.step)
