"""How to make a row again: the command for what `fracbit quantize` can do, the grid for what only a sweep can."""

from __future__ import annotations

import json
import shlex

from fracbit.records.row import Row
from fracbit.records.scheme import scale_label


def command_of(row: Row) -> str:
    """A shell command; for a float row the evaluation, for arms that only studies have the sweep of `grid_of`."""
    run = row.run
    recipe, scheme = run.recipe, run.recipe.scheme
    model = shlex.quote(recipe.model)
    if not run.quantized:
        return f"fracbit eval {model} --text {shlex.quote(run.evaluation.text)}"
    if run.outliers is not None or run.correction != "none" or run.calibration is not None:
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
    lines = [f"models = {_toml(recipe.model)}", f"baseline = {_toml(not run.quantized)}", "", "[evaluation]"]
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


def _toml(value: object) -> str:
    """Strings, numbers, booleans and lists are written in TOML as in JSON."""
    return json.dumps(value, ensure_ascii=False)
