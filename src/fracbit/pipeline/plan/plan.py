"""The arc of a budget, from a model on disk to an allocation. No weights are written.

open -> problem -> scores -> losses -> solve -> contest -> Plan

problem.py   what is asked and what may vary: units, levels, bits      written.py  bytes of the files, to the header
scoring.py   what each unit is worth; passes.py, sampling.py           solve.py    losses divided within the budget
contest.py   against the best uniform scheme, on held-out text         needs.py    memory, disk, time of the run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples
from fracbit.errors import RecipeError
from fracbit.importance import scheme_bits, score_method
from fracbit.pipeline.plan.contest import UNCHECKED, Contest, contest
from fracbit.pipeline.plan.needs import Needs, needs_of
from fracbit.pipeline.plan.presets import preset
from fracbit.pipeline.plan.problem import Problem, make_problem
from fracbit.pipeline.plan.sampling import sampling_notes
from fracbit.pipeline.plan.solve import Candidate, Curve, curves_of, scores_and_losses, solve
from fracbit.pipeline.quantize.run import open_for
from fracbit.pipeline.study.study import Study
from fracbit.pipeline.study.texts import LENGTH, SAMPLES, SCORED, seen_by, texts_of
from fracbit.records.allocation import Allocation
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.recipe import Recipe
from fracbit.records.scores import Losses
from fracbit.records.spending import Spending


@dataclass(frozen=True)
class Plan:
    """How a budget is spent.

    - `candidates`: every way that was tried, the solver's own first; `allocation`: the one to carry out, of the layers that
      share the budget: the chosen candidate's, or the uniform one where that won the contest.
    - `losses`: what the division rests on; `curve`: (stored bits per weight, predicted loss) by solver, for the picture.
    - `needs`: what the run itself will take; `contest`: what held-out text said, None where none was given.
    """

    problem: Problem
    losses: Losses
    candidates: tuple[Candidate, ...]
    allocation: Allocation
    needs: Needs
    curve: Mapping[str, Curve]
    contest: Contest | None = None
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """What the solver that was asked for found."""
        return self.candidates[0]

    @property
    def budget(self) -> str:
        """What was asked for, such as `3.5000 bits per weight`."""
        return self.problem.budget.figure(self.problem.budget.bits)

    @property
    def spelled_out(self) -> Allocation:
        """The allocation of every linear of the model, those that the recipe fixes among them."""
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
            "allocation": self.spelled_out.to_json(),
            "needs": asdict(self.needs),
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
    samples: int = SAMPLES,
    length: int = LENGTH,
    progress: Shown = "auto",
) -> Plan:
    """Plan how a model would spend a budget: a folder, a hub id, or a recipe, whose overrides hold.

    - `text`: what the score reads, in place of `spending.text`; `samples` of `length` ids of it and of the held-out text.
    - `whole`: data-free scores read all of large weights, not a sample of their rows.
    - `curve`: solve for the whole reachable range too.

    Raises `BudgetError` (with the reachable range), `RecipeError`, `SchemeError`, `SourceError`, `DataError`.
    """
    recipe = model if isinstance(model, Recipe) else Recipe(model=str(model))
    spending = spending if text is None else replace(spending, text=text)
    with showing(progress) as show:
        return make_plan(
            recipe,
            spending,
            open_for(recipe),
            whole=whole,
            curve=curve,
            samples=samples,
            length=length,
            progress=show,
        )


def make_plan(
    recipe: Recipe,
    spending: Spending,
    opened: Opened,
    *,
    whole: bool = False,
    curve: bool = False,
    samples: int = SAMPLES,
    length: int = LENGTH,
    progress: Progress | None = None,
) -> Plan:
    """`plan`, for a model that is open already."""
    # What is asked, and what may vary.
    recipe, terms = (recipe, spending) if spending.preset is None else preset(recipe, spending)
    problem = make_problem(recipe, opened, terms, whole)
    # Scores and losses of every unit; text is read, and the model loaded, only where the score reads some.
    study = Study(opened, recipe.seed, progress)
    drawn = _drawn(study, recipe, terms, samples=samples, length=length)
    subject, ids = (None, None) if drawn is None else (study.subject, drawn.ids)
    scores, losses = scores_and_losses(
        problem, terms.named_score(), subject=subject, ids=ids, progress=progress
    )
    if drawn is not None:
        losses = replace(losses, protocol={**losses.protocol, "text": seen_by(drawn)})
    # The budget divided, and what carrying that out would take.
    solved = solve(problem, scores, losses, terms.solver)
    chosen = solved.candidates[0].allocation
    found = Plan(
        problem,
        losses,
        solved.candidates,
        chosen,
        needs=needs_of(problem, chosen),
        curve=curves_of(problem, scores, losses) if curve else {},
        notes=(*solved.notes, *sampling_notes(losses.protocol)),
    )
    # Judged against the best uniform scheme of no more bytes; a preset was judged when it was made.
    if terms.held_out is not None:
        return _judged(found, study, terms.held_out, samples=samples, length=length)
    return found if spending.preset is not None else replace(found, notes=(*found.notes, UNCHECKED))


def _drawn(study: Study, recipe: Recipe, spending: Spending, *, samples: int, length: int) -> Samples | None:
    """What the score reads: its own text, else the recipe's calibration texts; None for a score that reads nothing.

    Of calibration texts no more is read than the calibration itself will read. Raises `RecipeError` when there is no text.
    """
    score = spending.named_score()
    if not isinstance(score, str) or score_method(score).data_free:
        return None
    if spending.text is not None:
        return study.seen(spending.text, samples, length)
    calibration = recipe.calibration
    if calibration is None or not calibration.texts:
        raise RecipeError(
            f"score {score} reads text: pass --text FILE (to quantize --set spending.text=FILE, or --calibration FILE), "
            "or take a data-free score such as zd"
        )
    return study.seen(calibration.texts, min(samples, calibration.samples), min(length, calibration.length))


def _judged(found: Plan, study: Study, held_out: str, *, samples: int, length: int) -> Plan:
    """The plan after the contest, with notes of what won and of text that is not as unseen as it should be."""
    problem = found.problem
    unseen = study.held_out(held_out, samples, length)
    measured = contest(
        study.subject,
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
