"""How a budget is spent, from a model on disk to an allocation. No weights are written.

open -> problem -> scores -> losses -> solve -> contest -> Plan

problem.py   the question: units, levels and bits                      written.py  bytes of the files with headers
scoring.py   the score of each unit; passes.py, sampling.py            solve.py    division of the budget
contest.py   against the best uniform scheme, on held-out text         needs.py    memory, disk, time of the run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples
from fracbit.errors import BudgetError
from fracbit.importance import scheme_bits, score_method
from fracbit.pipeline.plan.about import bits_about
from fracbit.pipeline.plan.contest import UNCHECKED, Contest, contest
from fracbit.pipeline.plan.needs import needs_or_why
from fracbit.pipeline.plan.presets import preset
from fracbit.pipeline.plan.problem import Problem, make_problem
from fracbit.pipeline.plan.sampling import sampling_notes
from fracbit.pipeline.plan.scoring import model_for
from fracbit.pipeline.plan.solve import (
    Candidate,
    Curve,
    UniformLevel,
    curves_of,
    neighbours,
    scores_and_losses,
    solve,
)
from fracbit.pipeline.plan.target import for_engine
from fracbit.pipeline.quantize.run import open_for
from fracbit.pipeline.quantize.schedule import make_schedule
from fracbit.pipeline.quantize.share import share_of
from fracbit.pipeline.study.study import Study
from fracbit.pipeline.study.texts import SCORED, seen_by, texts_of
from fracbit.records.allocation import Allocation, allocated
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs
from fracbit.records.run import Share
from fracbit.records.scores import Losses
from fracbit.records.spending import ONE_BUDGET, Spending, check_terms, score_without_text


@dataclass(frozen=True)
class Plan:
    """How a budget is spent. `print(plan)` shows it in a few lines.

    - `candidates`: every allocation that was tried, the chosen solver's first; `allocation`: the one to carry out, for
      the layers that share the budget: the chosen candidate's, or the uniform one if it won the contest.
    - `losses`: the basis of the division; `curve`: (stored bits per weight, predicted loss) by solver, for the picture.
    - `needs`: what the run will take, or why that is not known; `share`: how much of the model becomes smaller (None: not
      measured); `contest`: the result on held-out text, None without one.
    - `samples`: those of the recipe's calibration, if the score has read them.
    """

    problem: Problem = field(repr=False)
    losses: Losses = field(repr=False)
    candidates: tuple[Candidate, ...]
    allocation: Allocation = field(repr=False)
    needs: Needs | str
    share: Share | None
    curve: Mapping[str, Curve] = field(repr=False)
    contest: Contest | None = None
    notes: tuple[str, ...] = ()
    samples: Samples | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Bits asked for and reached, schemes, predicted loss, needs and notes, a line each."""
        loss = "unknown" if self.predicted_loss is None else f"{self.predicted_loss:.5g}"
        return "\n".join([
            f"{self.problem.recipe.model}: asked for {self.budget}, reached {self.reached}",
            f"schemes: {self.spelled_out}",
            f"predicted loss: {loss} ({self.losses.method})",
            f"the run: {self.needs}",
            *([str(self.share)] if self.share else []),
            *(f"note: {note}" for note in self.notes),
        ])  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """The recipe that carries the plan out: `fracbit.quantize(plan.recipe, output)`."""
        return allocated(self.problem.recipe, self.allocation)

    @property
    def chosen(self) -> Candidate:
        """The candidate of the requested solver."""
        return self.candidates[0]

    @property
    def budget(self) -> str:
        """The budget, such as `3.5000 bits per weight`."""
        return self.problem.budget.figure(self.problem.budget.bits)

    @property
    def reached(self) -> str:
        """What the allocation takes, such as `3.4987 bits per weight`, or `1.203 GB, 3.4987 bits per weight`."""
        budget, bits = self.problem.budget, self.problem.bits(self.allocation.schemes)
        average = f"{budget.per_weight(bits):.4f} bits per weight"
        return average if budget.figure(bits) == average else f"{budget.figure(bits)}, {average}"

    @property
    def predicted_loss(self) -> float | None:
        """Of the allocation, in the units of the score; None for a uniform scheme that won and is none of the candidates."""
        schemes = self.allocation.schemes
        alike = (each.predicted_loss for each in self.candidates if each.allocation.schemes == schemes)
        return next(alike, None)

    @property
    def neighbours(self) -> tuple[UniformLevel, ...]:
        """One level for every layer: the best that the budget allows, and those next to it."""
        return neighbours(self.problem, self.losses)

    @property
    def spelled_out(self) -> Allocation:
        """The allocation of every linear of the model, including those that the recipe fixes."""
        return self.problem.spelled_out(self.allocation)

    @property
    def bits_per_weight(self) -> dict[str, float]:
        """Stored bits per weight of every linear."""
        shapes = self.problem.weights.shapes
        return {
            name: scheme_bits(scheme, shapes[name]) / (shapes[name][0] * shapes[name][1])
            for name, scheme in self.spelled_out.schemes.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object, with the allocation spelled out."""
        return {
            "model": self.problem.recipe.model,
            "budget": self.budget,
            "candidates": [
                {k: v for k, v in asdict(c).items() if k != "allocation"} for c in self.candidates
            ],
            "neighbours": [
                asdict(each) | {"scheme": str(each.scheme or "float")} for each in self.neighbours
            ],
            "allocation": self.spelled_out.to_json(),
            "needs": self.needs if isinstance(self.needs, str) else asdict(self.needs),
            "share": None if self.share is None else asdict(self.share),
            "held_out": None if self.contest is None else self.contest.to_json(),
            "notes": list(self.notes),
        }


def plan(
    model: str | Path | Recipe,
    spending: Spending,
    *,
    text: str | None = None,
    whole: bool = False,
    curve: bool = False,
    progress: Shown = "auto",
) -> Plan:
    """Plan how to spend a budget on a model: a folder, a hub id, or a recipe, whose overrides apply.

    - `text`: the text that the score reads, in place of `spending.text`.
    - `whole`: data-free scores read all rows of large weights, not a sample.
    - `curve`: solve for the whole reachable range too.

    Raises `BudgetError` (with the reachable range), `RecipeError`, `SchemeError`, `SourceError`, `DataError`.
    """
    recipe = model if isinstance(model, Recipe) else Recipe(model=str(model))
    spending = spending if text is None else replace(spending, text=text)
    check_terms(recipe, spending)
    with showing(progress) as show:
        opened = open_for(recipe, afar=_reads_weights_alone(spending))
        return make_plan(recipe, spending, opened, whole=whole, curve=curve, progress=show)


def _reads_weights_alone(spending: Spending) -> bool:
    """Whether no part of a plan runs the model, so that samples of its weights are enough."""
    score = spending.named_score()
    return spending.held_out is None and isinstance(score, str) and score_method(score).data_free


def make_plan(
    recipe: Recipe,
    spending: Spending,
    opened: Opened,
    *,
    whole: bool = False,
    curve: bool = False,
    device: str = "cpu",
    measured: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """`plan`, for a model that is open already and terms that were checked.

    `device`: of the run that follows; `measured`: whether it is tried what that will take.
    """
    # The question: units, levels and bits.
    own, terms = recipe, spending
    if spending.preset is not None:
        recipe, terms = preset(recipe, spending, opened.weights, average=bits_about(spending, recipe, opened))
    if not terms.asked:
        raise BudgetError(f"a plan divides a budget: {ONE_BUDGET}")
    served = for_engine(recipe, terms, opened, own=own)
    recipe, terms = served.recipe, served.spending
    problem = make_problem(recipe, opened, terms, whole, some=served.levels)
    # Scores and losses of every unit. Text is read and the model is loaded only if the score reads text.
    study = Study(opened, recipe.seed, progress, device)
    drawn = _drawn(study, recipe, terms)
    named = terms.named_score()
    ids = None if drawn is None else drawn.ids[: terms.samples, : terms.length]  # [samples, tokens]
    where = None if ids is None else model_for(str(named), study, ids)
    scores, losses = scores_and_losses(problem, named, float_model=where, ids=ids, progress=progress)
    if drawn is not None:
        losses = replace(losses, protocol={**losses.protocol, "text": seen_by(drawn)})
    # Divide the budget.
    solved = solve(problem, scores, losses, terms.solver)
    chosen = solved.candidates[0].allocation
    found = Plan(
        problem,
        losses,
        solved.candidates,
        chosen,
        needs="not measured",
        share=None,
        curve=curves_of(problem, scores, losses) if curve else {},
        notes=(*served.notes, *solved.notes, *sampling_notes(losses.protocol)),
        samples=drawn if terms.text is None else None,
    )
    # Compare with the best uniform scheme of no more bytes; a preset holds no text out for that.
    if terms.held_out is not None:
        found = _judged(found, study, terms.held_out, terms)
    elif spending.preset is None:
        found = replace(found, notes=(*found.notes, UNCHECKED))
    if not measured:
        return found
    share = share_of(opened, make_schedule(found.recipe, opened))
    return replace(found, needs=needs_or_why(found.recipe, opened, device), share=share)


def _drawn(study: Study, recipe: Recipe, spending: Spending) -> Samples | None:
    """Samples of the score's own text, else those of the recipe's calibration; None for a data-free score.

    The calibration's are all that the run will read, so that it need not draw them, or let the model write them, again.
    Raises `RecipeError` without a text.
    """
    score = spending.named_score()
    if not isinstance(score, str) or score_method(score).data_free:
        return None
    if spending.text is not None:
        return study.seen(spending.text, spending.samples, spending.length)
    if recipe.calibration is None or not recipe.calibration.texts:
        raise score_without_text(score)
    return study.calibration(recipe)


def _judged(found: Plan, study: Study, held_out: str, spending: Spending) -> Plan:
    """The plan after the contest, with notes on the winner and on held-out text that was seen before."""
    problem = found.problem
    unseen = study.held_out(held_out, spending.samples, spending.length)
    measured = contest(
        study.float_model,
        problem.units,
        found.allocation,
        unseen.ids,
        levels=problem.levels,
        budget=problem.budget.bits,
    )
    seen = texts_of(found.losses.protocol)
    calibration = problem.recipe.calibration
    known = {str(entry["source"]) for entry in seen}
    others = [{"source": text} for text in (calibration.texts if calibration else ()) if text not in known]
    notes = dict.fromkeys((*found.notes, *measured.winner.notes))
    overlap = (
        *study.reader.overlap(held_out, others, "calibration text"),
        *study.reader.overlap(held_out, seen, SCORED),
    )
    return replace(found, allocation=measured.winner, contest=measured, notes=(*notes, *overlap))
