"""A sweep, as its TOML file states it, and its expansion into runs.

    models = ["tales-s", "tales-m"]        # folders below `root`, or hub ids
    root = "models"                        # where relative paths start; default: the folder of this file
    baseline = true                        # the float models too

    [evaluation]
    text = "tales-evaluation.u16?length=512&first=64"

    [calibration]                          # a recipe's [calibration]; for the runs that read calibration data
    text = "tales-calibration.u16?length=512"
    samples = 32
    length = 256

    [[arm]]                                # the product of all lists; any number of arms
    dtypes = ["int", "nf"]
    bits = [3, 4]
    blocks = [64, 128, "row"]
    quantizers = ["rtn", "gptq"]
    chains = ["quantized", "float"]        # what a block is calibrated on: the quantized blocks before it, or the float ones

    [[arm.exclude]]                        # points that match all of a table's keys are left out
    dtype = "nf"
    block = "row"

A point that no scheme can express (a 1-bit symmetric int) is left out and counted with its reason. A name that does not
exist is an error that names its line. A run that two arms share is one run. Where nothing is drawn at random (rounding
without calibration data), all seeds are one run, which has seed 0.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fracbit.errors import FracbitError, RecipeError, SchemeError, near_matches
from fracbit.records.calibration import Calibration
from fracbit.records.inputs import parse_inputs
from fracbit.records.outliers import read_outliers
from fracbit.records.recipe import Recipe, SchemeField, read_toml
from fracbit.records.row import KEEP_ALL, OLD_SAMPLES, Evaluation, Run, run_key
from fracbit.records.scheme import Scheme
from fracbit.records.tables import COLUMN_RULES, CORRECTIONS, DATATYPES, QUANTIZERS, TRANSFORMS


def _many(value: object) -> object:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


Strings = Annotated[tuple[str, ...], BeforeValidator(_many), Field(min_length=1)]
Integers = Annotated[tuple[int, ...], BeforeValidator(_many), Field(min_length=1)]
Blocks = Annotated[tuple[int | str, ...], BeforeValidator(_many), Field(min_length=1)]
Booleans = Annotated[tuple[bool, ...], BeforeValidator(_many), Field(min_length=1)]


def _without_prefix(value: object) -> object:
    """`tweak-closed`, as files of version 0.1 write it, is `closed`."""
    names = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(str(name).removeprefix("tweak-") for name in names)


def _calibration(value: object) -> object:
    """A recipe's calibration; it may have one `text` instead of `texts`, and its default for `samples` is smaller."""
    if not isinstance(value, Mapping):
        return value
    rest = {name: part for name, part in value.items() if name != "text"}
    return {**OLD_SAMPLES, **({"texts": (value["text"],)} if "text" in value else {}), **rest}


Corrections = Annotated[tuple[str, ...], BeforeValidator(_without_prefix), Field(min_length=1)]
CalibrationTable = Annotated[Calibration, BeforeValidator(_calibration)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exclusion(_Table):
    """Points to leave out: those that match every key given. A key holds one value or a list."""

    model: Strings | None = None
    dtype: Strings | None = None
    bits: Integers | None = None
    block: Blocks | None = None
    axis: Strings | None = None
    offset: Strings | None = None
    scale: Strings | None = None
    quantizer: Strings | None = None
    search: Booleans | None = None
    chain: Strings | None = None
    transform: Strings | None = None
    correction: Corrections | None = None
    inputs: Strings | None = None
    outliers: Strings | None = None
    seed: Integers | None = None

    def matches(self, point: Mapping[str, object]) -> bool:
        """Whether every key that is given holds the point's value."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return all(point[name] in allowed for name, allowed in given.items() if allowed is not None)


class Arm(_Table):
    """A product of lists. Every key takes one value or a list; `models` defaults to the sweep's.

    A transform is `none`, one name, or several with + between them; `inputs` is `none` or a rounding such as `int8/token`.
    """

    name: str = ""
    models: Strings | None = None
    dtypes: Strings = ("int",)
    bits: Integers = (4,)
    blocks: Blocks = (64,)
    axes: Strings = ("in",)
    offsets: Strings = ("none",)
    scales: Strings = ("fp16",)
    quantizers: Strings = ("rtn",)
    search: Booleans = (False,)
    chains: Strings = ("quantized",)
    transforms: Strings = ("none",)
    corrections: Corrections = ("none",)
    inputs: Strings = ("none",)
    outliers: Strings = ("none",)
    seeds: Integers = (0,)
    exclude: tuple[Exclusion, ...] = ()


class Sweep(_Table):
    """A whole sweep, as its file states it. `root`: where relative paths start, relative to the file's own folder."""

    models: Strings
    evaluation: Evaluation
    root: str = "."
    calibration: CalibrationTable | None = None
    baseline: bool = True
    embeddings: SchemeField | None = None
    head: SchemeField | None = None
    trust_remote_code: bool = False
    arm: tuple[Arm, ...] = Field(min_length=1)
    exclude: tuple[Exclusion, ...] = ()


@dataclass(frozen=True)
class Expansion:
    """The runs of a sweep, each once, in the order of the file; and the points left out (`skipped`), counted by reason."""

    runs: dict[str, Run]
    skipped: Mapping[str, int]

    @property
    def models(self) -> tuple[str, ...]:
        """The models in order of first appearance."""
        return tuple(dict.fromkeys(run.recipe.model for run in self.runs.values()))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises `RecipeError` that names the key and its line."""
    data = read_toml(path)
    text = path.read_text(encoding="utf-8")
    try:
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            _explain(first["loc"], first["type"], message=first["msg"], path=path, text=text)
        ) from None
    except FracbitError as error:
        raise RecipeError(f"{path}: {error}") from error
    for index, arm in enumerate(sweep.arm):
        _check_names(arm, index, path, text)
    return sweep


def expand(sweep: Sweep) -> Expansion:
    """All runs of a sweep. Raises `RecipeError` when there is none."""
    skipped: Counter[str] = Counter()
    runs = {run_key(run): run for run in _baselines(sweep)}
    for point in itertools.chain(*(_points(sweep, arm, skipped) for arm in sweep.arm)):
        run = _run(sweep, point)
        key = run_key(run)
        if key in runs:
            skipped[NAMED if point["seed"] == run.recipe.seed else SEEDLESS] += 1
        runs.setdefault(key, run)
    if not runs:
        reasons = "; ".join(f"{count} points: {reason}" for reason, count in skipped.items())
        raise RecipeError(f"the sweep has no runs ({reasons}); loosen its exclusions")
    return Expansion(runs, dict(skipped))


def _baselines(sweep: Sweep) -> Iterator[Run]:
    named = itertools.chain(sweep.models, *(arm.models or () for arm in sweep.arm))
    for model in dict.fromkeys(named) if sweep.baseline else ():
        recipe = Recipe(model=model, trust_remote_code=sweep.trust_remote_code, overrides=(KEEP_ALL,))
        yield Run(recipe=recipe, evaluation=sweep.evaluation)


NAMED = "named by an earlier arm"
SEEDLESS = "another seed of a run that draws nothing at random"

_AXES = {
    "model": "models", "dtype": "dtypes", "bits": "bits", "block": "blocks", "axis": "axes", "offset": "offsets",
    "scale": "scales", "quantizer": "quantizers", "search": "search", "chain": "chains", "transform": "transforms",
    "correction": "corrections", "inputs": "inputs", "outliers": "outliers", "seed": "seeds",
}  # fmt: skip


def _points(sweep: Sweep, arm: Arm, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """The points of an arm that are runs; the others are counted."""
    lists = [
        sweep.models if name == "models" and arm.models is None else getattr(arm, name)
        for name in _AXES.values()
    ]
    for values in itertools.product(*lists):
        point = dict(zip(_AXES, values, strict=True))
        reason = _left_out(point, sweep, arm)
        if reason:
            skipped[reason] += 1
        else:
            yield point


def _left_out(point: Mapping[str, Any], sweep: Sweep, arm: Arm) -> str:
    """Why a point is not a run, "" when it is one."""
    if any(rule.matches(point) for rule in (*sweep.exclude, *arm.exclude)):
        return "excluded by the sweep"
    reason = _scheme_fault(*(point[name] for name in ("dtype", "bits", "block", "axis", "offset", "scale")))
    if not reason and _needs_text(point) and sweep.calibration is None:
        return "needs calibration text: add a [calibration] table"
    return reason


def _needs_text(point: Mapping[str, Any]) -> bool:
    chosen = (point["transform"], point["correction"], point["inputs"])
    from fracbit.quantizers import quantizer

    reads = bool(quantizer(point["quantizer"]).needs) or "energy" in _rule_needs(point)
    return reads or any(name != "none" for name in chosen)


def _draws(point: Mapping[str, Any]) -> bool:
    """Whether the run of a point draws anything at random: calibration samples, or columns."""
    return _needs_text(point) or "chance" in _rule_needs(point)


def _rule_needs(point: Mapping[str, Any]) -> frozenset[str]:
    """What the column rule of a point needs."""
    outliers = read_outliers(point["outliers"])
    needs: frozenset[str] = frozenset() if outliers is None else COLUMN_RULES[outliers.chosen].needs
    return needs


@lru_cache(maxsize=4096)
def _scheme_fault(*fields: Any) -> str:
    from fracbit.numerics import check_datatype

    try:
        check_datatype(Scheme(*fields))
    except SchemeError as error:
        return str(error)
    return ""


def _run(sweep: Sweep, point: Mapping[str, Any]) -> Run:
    names = ("dtype", "bits", "block", "axis", "offset", "scale")
    recipe = Recipe(
        model=point["model"],
        trust_remote_code=sweep.trust_remote_code,
        scheme=Scheme(**{name: point[name] for name in names}),
        embeddings=sweep.embeddings,
        head=sweep.head,
        quantizer=point["quantizer"],
        search=point["search"],
        outliers=read_outliers(point["outliers"]),
        calibration=_calibrated(sweep, point) if _needs_text(point) else None,
        seed=point["seed"] if _draws(point) else 0,
    )
    return Run(recipe=recipe, evaluation=sweep.evaluation)


def _calibrated(sweep: Sweep, point: Mapping[str, Any]) -> Calibration:
    assert sweep.calibration is not None
    chosen = {
        "chain": point["chain"],
        "transforms": () if point["transform"] == "none" else tuple(point["transform"].split("+")),
        "tweak": point["correction"],
        "inputs": None if point["inputs"] == "none" else point["inputs"],
    }
    return sweep.calibration.model_copy(update=chosen)


def _check_names(arm: Arm, index: int, path: Path, text: str) -> None:
    """Refuse a misspelled name; a combination that cannot exist is only left out."""
    tables: dict[str, tuple[tuple[str, ...], Collection[str]]] = {
        "dtypes": (tuple(dtype.split(":", 1)[0] for dtype in arm.dtypes), DATATYPES.entries),
        "quantizers": (tuple(word.split(":", 1)[0].strip() for word in arm.quantizers), QUANTIZERS.entries),
        "chains": (arm.chains, {"quantized": 0, "float": 0}),
        "transforms": (_parts(arm.transforms), {"none": 0, **TRANSFORMS.entries}),
        "corrections": (
            tuple(word.split(":", 1)[0].strip() for word in arm.corrections),
            {"none": 0, **CORRECTIONS.entries},
        ),
        "axes": (arm.axes, {"in": 0, "out": 0}),
        "offsets": (arm.offsets, {"none": 0, "zero": 0, "float": 0, "mean": 0}),
    }
    for field, (names, known) in tables.items():
        for name in names:
            if name not in known:
                where = f"{path}{_line_of(('arm', index, field), text)}"
                raise RecipeError(f"{where}: {field} has no {name!r}; {near_matches(name, known)}")
    _check_values(arm, index, path, text)


def _parts(transforms: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for name in transforms for part in name.split("+"))


def _check_values(arm: Arm, index: int, path: Path, text: str) -> None:
    checks: list[tuple[str, Any]] = [
        *(("bits", {"bits": bits}) for bits in arm.bits),
        *(("blocks", {"block": block}) for block in arm.blocks),
        *(("scales", {"scale": scale}) for scale in arm.scales),
    ]
    key = ""
    try:
        for field, fields in checks:
            key = field
            Scheme(**fields)
        key = "outliers"
        for outliers in arm.outliers:
            read_outliers(outliers)
        key = "quantizers"
        for word in filter(_has_options, arm.quantizers):
            from fracbit.quantizers import quantizer

            quantizer(word)
        key = "corrections"
        for word in filter(_has_options, arm.corrections):
            from fracbit.models.correction import correction

            correction(word)
        key = "inputs"
        for inputs in arm.inputs:
            if inputs != "none":
                parse_inputs(inputs)
    except (SchemeError, RecipeError) as error:
        raise RecipeError(f"{path}{_line_of(('arm', index, key), text)}: {error}") from None


def _has_options(word: str) -> bool:
    """Whether a name, which was checked, has options, which only its object knows."""
    return ":" in word


_MODELS: dict[str, type[BaseModel]] = {
    "arm": Arm, "exclude": Exclusion, "evaluation": Evaluation, "calibration": Calibration,
}  # fmt: skip


def _explain(location: tuple[int | str, ...], kind: str, message: str, path: Path, text: str) -> str:
    name = str(location[-1])
    where = f"{path}{_line_of(location, text)}"
    tables = [part for part in location[:-1] if part in _MODELS]
    holder = _MODELS[str(tables[-1])] if tables else Sweep
    if kind == "extra_forbidden":
        what = f"[[{tables[-1]}]]" if tables else "a sweep"
        return f"{where}: {what} has no key {name!r}; {near_matches(name, holder.model_fields)}"
    dotted = ".".join(str(part) for part in location)
    return f"{where}: {dotted}: {message}"


def _line_of(location: tuple[int | str, ...], text: str) -> str:
    """`, line N` of a key: the first line that sets it inside its table, or the line of the table when it is missing."""
    lines = text.splitlines()
    start = 0
    found = 0
    for position, part in enumerate(location):
        if isinstance(part, int):
            continue
        nth = (
            location[position + 1]
            if position + 1 < len(location) and isinstance(location[position + 1], int)
            else 0
        )
        pattern = re.compile(
            rf"\s*(\[+\s*[\w.]*\b{re.escape(part)}\s*\]|[\"']?{re.escape(part)}[\"']?\s*[=.])"
        )
        hits = [number for number in range(start, len(lines)) if pattern.match(lines[number])]
        headers = [number for number in hits if lines[number].lstrip().startswith("[")]
        hit = headers[int(nth)] if int(nth) < len(headers) else (hits[0] if hits else None)
        if hit is None:
            break
        found, start = hit + 1, hit
    return f", line {found}" if found else ""
