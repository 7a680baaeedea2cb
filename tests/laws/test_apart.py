"""What differs is told apart: runs with different keys have different labels, and a curve mixes no two settings.

Over every axis of an arm, and over every field of a recipe and of its calibration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest

from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.row import Evaluation, Row, Run, label, run_key
from fracbit.records.scheme import Scheme
from fracbit.records.tables import COLUMN_RULES, CORRECTIONS, DATATYPES, QUANTIZERS, TRANSFORMS
from fracbit.report.fit import slices
from fracbit.report.slices import named, slice_of
from fracbit.sweeps.spec import Arm, Expansion, Sweep, expand

EVALUATION = Evaluation(text="t.u16")
AXES: dict[str, tuple[Any, ...]] = {
    "models": ("a/x", "b/x"),
    "dtypes": tuple(DATATYPES),
    "bits": (3, 4),
    "blocks": (64, "row", "flat:64"),
    "axes": ("in", "out"),
    "offsets": ("none", "zero", "float", "mean"),
    "scales": ("fp16", "bf16", "int8:256", "int8:64"),
    "quantizers": tuple(QUANTIZERS),
    "search": (False, True),
    "chains": ("quantized", "float"),
    "transforms": ("none", *TRANSFORMS, "smooth+awq", "awq+smooth"),
    "corrections": ("none", *CORRECTIONS),
    "inputs": ("none", "int8/token", "int8/tensor"),
    "outliers": ("none", *(f"{rule}:0.02" for rule in COLUMN_RULES), "cost:0.05"),
    "seeds": (0, 1),
}
OTHERWISE: dict[str, Any] = {
    "embeddings": Scheme("int", 8),
    "head": Scheme("nf", 4),
    "towers": Scheme("nf", 4),
    "quantizer": "descent",
    "search": True,
    "outliers": "proxy:0.02",
    "overrides": (Override(layers="*.mlp.*", keep=True),),
}
CALIBRATED_OTHERWISE: dict[str, Any] = {
    "texts": ("other.u16",),
    "builtin": 0.25,
    "samples": 64,
    "length": 64,
    "batch": 2,
    "chain": "float",
    "sequential": True,
    "transforms": ("awq",),
    "inputs": "int8/token",
    "weigh": "loss",
    "axis": "predicted",
    "tweak": "auto",
    "distill": 2,
    "rate": 0.01,
    "dtype": "float32",
}
PLAN = Calibration(texts=("c.u16",))
GPTQ = Recipe(model="m", quantizer="gptq", search=False, calibration=PLAN)


def other(name: str) -> Recipe:
    """The recipe above with another value of one field, its own or its calibration's."""
    if name in OTHERWISE:
        return Recipe.model_validate({**dict(GPTQ), name: OTHERWISE[name]})
    return GPTQ.model_copy(update={"calibration": PLAN.model_copy(update={name: CALIBRATED_OTHERWISE[name]})})


def row_of(recipe: Recipe) -> Row:
    run = Run(recipe=recipe, evaluation=EVALUATION)
    return Row(key=run_key(run), run=run, status="done")


def grid() -> Expansion:
    """Every pair of axes in full, with and without calibration data."""
    arms = [
        Arm(**{first: AXES[first], second: AXES[second], "quantizers": AXES["quantizers"]})
        for first, second in combinations(AXES, 2)
    ]
    sweep = Sweep(models=AXES["models"], evaluation=EVALUATION, calibration=PLAN, arm=tuple(arms))
    return expand(sweep)


def without(run: Run) -> str:
    """The key that a run would have without its model, bits and seed."""
    recipe = run.recipe.model_copy(update={"model": "", "seed": 0, "scheme": run.recipe.scheme.with_bits(1)})
    return run_key(run.model_copy(update={"recipe": recipe}))


def test_every_axis_of_an_arm_is_in_the_grid() -> None:
    assert AXES.keys() == Arm.model_fields.keys() - {"name", "exclude"}


def test_labels_of_a_sweep_are_unique() -> None:
    named_alike = defaultdict(list)
    for key, run in grid().runs.items():
        named_alike[label(run)].append(key)
    assert len(named_alike) > 1000
    assert not {name: keys for name, keys in named_alike.items() if len(keys) > 1}


def test_runs_share_a_slice_exactly_when_only_model_bits_and_seed_differ() -> None:
    runs = [run for run in grid().runs.values() if run.quantized]
    pairs = {(slice_of(row_of(run.recipe)), without(run)) for run in runs}
    assert one_to_one(pairs)
    assert one_to_one((part, str(part)) for part, _ in pairs)


def one_to_one(pairs: Iterable[tuple[Any, Any]]) -> bool:
    both = set(pairs)
    return len(both) == len({one for one, _ in both}) == len({two for _, two in both})


def test_every_field_of_a_recipe_is_tried() -> None:
    apart = {"model", "revision", "trust_remote_code", "scheme", "seed", "calibration"}
    assert OTHERWISE.keys() == Recipe.model_fields.keys() - apart
    assert CALIBRATED_OTHERWISE.keys() == Calibration.model_fields.keys()
    assert not Recipe.model_fields.keys() & Calibration.model_fields.keys(), "a label names a field once"


@pytest.mark.parametrize("name", [*OTHERWISE, *CALIBRATED_OTHERWISE])
def test_a_curve_mixes_no_two_values_of_a_field(name: str) -> None:
    recipes = [
        base.model_copy(update={"model": model, "scheme": Scheme(bits=bits)})
        for base in (GPTQ, other(name))
        for model in ("a", "b")
        for bits in (3, 4, 5)
    ]
    found = slices([row_of(recipe) for recipe in recipes])
    assert [len(members) for members in found.values()] == [6, 6]
    words = named(found)
    assert len({*words.values()}) == 2
    assert words == {part: words[part] for part in named(reversed(list(found)))}


@pytest.mark.parametrize("name", [*OTHERWISE, *CALIBRATED_OTHERWISE])
def test_what_a_setting_is_called(name: str) -> None:
    """All but the data that a calibration reads stands in the label and in the words of the slice."""
    usual, changed = row_of(GPTQ), row_of(other(name))
    read = name in ("texts", "samples", "length", "batch")
    assert (label(usual.run) == label(changed.run)) == read
    assert (str(slice_of(usual)) == str(slice_of(changed))) == read


def test_model_bits_and_seed_share_a_slice() -> None:
    changes = {"model": "n", "seed": 1, "revision": "v2", "scheme": Scheme(bits=2), "trust_remote_code": True}
    parts = {slice_of(row_of(GPTQ.model_copy(update={name: value}))) for name, value in changes.items()}
    assert parts == {slice_of(row_of(GPTQ))}


def test_slices_with_the_same_words_say_what_differs() -> None:
    more = PLAN.model_copy(update={"samples": 64, "texts": ("c.u16", "d.u16")})
    parts = [slice_of(row_of(GPTQ.model_copy(update={"calibration": plan}))) for plan in (PLAN, more)]
    assert [*named(parts).values()] == [
        "int, block 64, gptq (texts c.u16, samples 128)",
        "int, block 64, gptq (texts c.u16 + d.u16, samples 64)",
    ]
    assert named(parts[:1]) == {parts[0]: "int, block 64, gptq"}
    rounded = [slice_of(row_of(Recipe(model="m", calibration=plan, search=False))) for plan in (None, PLAN)]
    assert [*named(rounded).values()] == [
        "int, block 64 (texts none)",
        "int, block 64 (texts c.u16, samples 128, length 512, batch 8)",
    ]
