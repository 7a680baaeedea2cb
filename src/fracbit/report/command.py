"""How to make a row again: the command for what `fracbit quantize` can do, the grid for what only a sweep can."""

from __future__ import annotations

import json
import shlex

from fracbit.records.row import Evaluation, Row
from fracbit.records.scheme import scale_label


def command_of(row: Row) -> str:
    """A shell command; for a float row the evaluation, for arms that only studies have the sweep of `grid_of`."""
    run = row.run
    recipe, scheme = run.recipe, run.recipe.scheme
    model = shlex.quote(recipe.model) + (" --trust-remote-code" if recipe.trust_remote_code else "")
    if not run.quantized:
        return " ".join([f"fracbit eval {model}", *_evaluation_flags(run.evaluation)])
    if run.outliers or run.correction != "none" or run.calibration or recipe.embeddings or recipe.head:
        return "fracbit sweep one.toml --store one.db"
    flags = [
        f"--dtype {shlex.quote(scheme.dtype)}",
        f"--bits {scheme.bits}",
        f"--block {shlex.quote(str(scheme.block))}",
    ]
    flags += [f"--axis {scheme.axis}"] if scheme.axis != "in" else []
    flags += [f"--offset {scheme.offset}"] if scheme.offset != "none" else []
    flags += [f"--scale {scale_label(scheme.scale)}"] if scheme.scale != "fp16" else []
    flags += [f"--quantizer {recipe.quantizer}"] if recipe.quantizer != "rtn" else []
    flags += ["--search"] if recipe.search else []
    return " ".join(["fracbit quantize", model, "-o OUT", *flags])


def grid_of(row: Row) -> str:
    """A grid file (TOML) whose only run is this row's."""
    run = row.run
    recipe, scheme = run.recipe, run.recipe.scheme
    lines = [f"models = {_toml(recipe.model)}", f"baseline = {_toml(not run.quantized)}"]
    whole = recipe.model_dump(mode="json", include={"trust_remote_code", "embeddings", "head"})
    lines += [f"{name} = {_toml(value)}" for name, value in whole.items() if value]
    lines += ["", "[evaluation]"]
    lines += [
        f"{name} = {_toml(value)}" for name, value in run.evaluation.model_dump(exclude_defaults=True).items()
    ]
    if run.calibration is not None:
        lines += ["", "[calibration]"]
        lines += [f"{name} = {_toml(value)}" for name, value in run.calibration.model_dump().items()]
    arm: dict[str, object] = {
        "dtypes": scheme.dtype, "bits": scheme.bits, "blocks": scheme.block, "axes": scheme.axis,
        "offsets": scheme.offset, "scales": scale_label(scheme.scale), "quantizers": recipe.quantizer,
        "search": recipe.search, "outliers": str(run.outliers or "none"), "corrections": run.correction,
        "seeds": recipe.seed,
    }  # fmt: skip
    return "\n".join(
        [*lines, "", "[[arm]]", *(f"{name} = {_toml(value)}" for name, value in arm.items()), ""]
    )


def _evaluation_flags(evaluation: Evaluation) -> list[str]:
    given = evaluation.model_dump(exclude_defaults=True)
    if "tasks" in given:
        given["tasks"] = ",".join(evaluation.tasks)
    return [f"--{name} {shlex.quote(str(value))}" for name, value in given.items()]


def _toml(value: object) -> str:
    """Strings, numbers, booleans and lists are written in TOML as in JSON, tables between braces."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
