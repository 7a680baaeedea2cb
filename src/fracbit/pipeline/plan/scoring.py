"""The earlier pass: what each unit is worth, ending in a JSON of floats. Allocations read nothing else.

    method -> what it needs (passes.py) -> a view of each unit -> one float a unit, or one a unit and scheme

Data-free scores read one weight at a time from the disk and never hold the model; of large weights they see a sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.opened import open_float
from fracbit.errors import DataError, RecipeError
from fracbit.importance import LayerView, ScoreMethod, Unit, predict_losses, reverse, score_method
from fracbit.pipeline.plan.passes import Findings, ablation, forward_pass, gradient_pass
from fracbit.pipeline.plan.sampling import Sampled, group_of, relative_error, sample_rows
from fracbit.pipeline.study.float_model import FloatModel
from fracbit.pipeline.study.study import Study
from fracbit.pipeline.study.texts import LENGTH, SAMPLES, seen_by
from fracbit.pipeline.study.weights import Weights, weights_on_disk
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores
from fracbit.records.spending import Granularity

LOW = "int2z/64"
WEIGHT_ERROR = "weight-error"


def score(
    model: str | Path,
    method: str,
    *,
    levels: str | Sequence[Scheme | None] | None = None,
    low: str | Scheme | None = LOW,
    granularity: Granularity = "block",
    fused: bool = False,
    whole: bool = False,
    text: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    progress: Shown = "auto",
) -> Scores | Losses:
    """Score every block or linear of a float model, a folder or a hub id; larger is more important.

    - `method`: a score of the table `SCORES`; `reverse:NAME` turns one round.
    - `low`: the scheme that scores look at which know schemes. `levels`: losses under each of these schemes instead of scores.
    - `granularity`, `fused`: what is scored; `whole`: all of large weights, not a sample of their rows.
    - `text`: for scores that read some, `samples` of `length` ids drawn from it with `seed`.

    What comes out goes into `Spending(score=...)`, or as JSON into `--score`.
    Raises `RecipeError` for an unknown score or one without its text, `SchemeError`, `SourceError`, `DataError`.
    """
    data_free = score_method(method).data_free
    schemes = read_levels(levels) if isinstance(levels, str) else levels
    lowest = read_level(low) if isinstance(low, str) else low
    with showing(progress) as show:
        study = Study(open_float(model), seed, show)
        where: Weights | FloatModel = weights_on_disk(study.opened, whole)
        drawn = None
        if text is not None and not data_free:
            where, drawn = study.subject, study.seen(text, samples, length)
        ids = None if drawn is None else drawn.ids
        units = weights_of(where).units(granularity, fused)
        found: Scores | Losses
        if schemes is None:
            found = make_scores(where, units, method, scheme=lowest, ids=ids, seed=seed, progress=show)
        else:
            found = make_losses(where, units, method, tuple(schemes), ids=ids, seed=seed, progress=show)
        return found if drawn is None else replace(found, protocol={**found.protocol, "text": seen_by(drawn)})


def make_scores(
    model: Weights | FloatModel,
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
    found, name = score_method(method), method.removeprefix("reverse:")
    if found.of_scheme is not None:
        if scheme is None:
            raise RecipeError(
                f"score {name!r} looks at what a scheme does to a layer; name the low level, such as nf2/64"
            )
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
    model: Weights | FloatModel,
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
    if found.of_scheme is None:
        errors = make_losses(model, units, WEIGHT_ERROR, schemes, progress=progress)
        scores = make_scores(model, units, method, ids=ids, seed=seed, progress=progress)
        return predict_losses(scores, errors)
    of_scheme = found.of_scheme
    job = _Job(model, units, found, tuple(schemes), ids=ids, seed=seed, progress=progress)
    rows, protocol = _evaluate(job, lambda view: tuple(of_scheme(view, scheme) for scheme in schemes))
    return Losses(job.schemes, rows, method, job.weights.fingerprint, protocol=protocol)


def weights_of(model: Weights | FloatModel) -> Weights:
    """The linears of either."""
    return model.weights if isinstance(model, FloatModel) else model


@dataclass(frozen=True, eq=False)
class _Job:
    """What is scored, by which method, under which schemes, on which text."""

    model: Weights | FloatModel
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
    """Every unit's numbers, of a sampled unit the mean over the halves of its sample; and the protocol of all that."""
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
    """One unit after the other with what the method needs in it, its weights in memory: one view, or two halves of a sample."""
    found = Findings() if job.method.data_free else _find(job)
    for index, unit in enumerate(job.units):
        view = _view(job, found, index, unit)
        yield tuple(replace(view, weights=weights) for weights in _weights(job, unit))
        job.step("scoring", index + 1, len(job.units))


def _view(job: _Job, found: Findings, index: int, unit: Unit) -> LayerView:
    """All that was found of one unit."""
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
    """What a score sees of a unit's weights: nothing, all of them, or two halves of a sample of their rows."""
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
    subject, ids, needs = job.model, job.ids, job.method.needs
    if ids is None or isinstance(subject, Weights):
        raise RecipeError(
            f"this score ({job.method.about}) reads text; name one with --text, or take a data-free score such as zd"
        )
    if ids.dim() != 2 or ids.numel() == 0:
        raise DataError(f"scores take token ids [samples, tokens], got the shape {tuple(ids.shape)}")
    if "loss" in needs:
        return Findings(changes=ablation(subject, job.units, job.schemes, ids, step=job.step))
    if needs & {"gradients", "slopes"}:
        schemes = job.schemes if "slopes" in needs else ()
        return gradient_pass(subject, job.units, schemes, ids, step=job.step)
    final_norm = "cosine behind the final norm" in needs
    return forward_pass(subject, ids, gram="gram" in needs, final_norm=final_norm, step=job.step)
