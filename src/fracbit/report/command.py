"""How to make a row again: a recipe for `fracbit quantize`, and the commands that quantize and evaluate with it."""

from __future__ import annotations

import shlex

from fracbit.records.recipe import recipe_toml
from fracbit.records.row import Evaluation, Row


def command_of(row: Row) -> str:
    """Shell commands that make and evaluate the row's model; for a float row, only the evaluation."""
    model = shlex.quote(row.run.recipe.model)
    trust = ["--trust-remote-code"] if row.run.recipe.trust_remote_code else []
    judged = model if not row.run.quantized else "OUT"
    evaluation = " ".join(
        ["fracbit eval", judged, *trust, *_evaluation_flags(row.run.evaluation), "--dtype float32"]
    )
    if not row.run.quantized:
        return evaluation
    return f"fracbit quantize recipe.toml -o OUT && {evaluation}"


def recipe_of(row: Row) -> str:
    """The recipe of a row as TOML, `recipe.toml` in its command."""
    return recipe_toml(row.run.recipe)


def _evaluation_flags(evaluation: Evaluation) -> list[str]:
    given = evaluation.model_dump(exclude_defaults=True)
    if "tasks" in given:
        given["tasks"] = ",".join(evaluation.tasks)
    return [f"--{name} {shlex.quote(str(value))}" for name, value in given.items()]
