"""`Spending`: what a quantized model may take, and how that is divided over its layers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fracbit.errors import BudgetError, RecipeError, check_choice
from fracbit.records.allocation import read_levels
from fracbit.records.checked import LARGEST
from fracbit.records.recipe import Recipe, check_data
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores, load_scores
from fracbit.records.sizes import read_size
from fracbit.records.tables import ENGINES, FILES_ONLY, SCORES, SERVING
from fracbit.records.text_source import GIVE, check_source

Granularity: TypeAlias = Literal["block", "linear"]
Solver: TypeAlias = Literal["exact", "order"]

LEVELS = "int4z/64,int3z/64,int2z/64"
WIDE = "int8/64,int6z/64,int5z/64,int4z/64,int3z/64,int2z/64"
SAMPLES = 32
LENGTH = 256
PRESETS = ("fast", "good", "best")
BUDGETS = ("average_bits", "size", "fits")
ONE_BUDGET = "ask for exactly one of --average-bits 3.5, --size 1.2GB and --fits 8GB"


@dataclass(frozen=True)
class Spending:
    """A budget and the terms on which it is divided. `Spending()` has no budget and divides nothing.

    - `average_bits`: stored bits per quantized weight; `size`: of all weight files, `1.2GB` or bytes; `fits`: memory of a
      device that also holds the KV cache and the activations. One of the three.
    - `context`: tokens of each sequence in that KV cache; `batch`: sequences at once.
    - `preset`: settings by how long they may take: `fast`, `good` or `best`; with a budget, or alone.
    - `engine`: a name of `ENGINES`; layers get only schemes that it serves, and its file is written at the end.
    - `levels`: the schemes to choose from, `nf4/64,nf2/64`, or a sequence of words and schemes; None: `LEVELS` around an
      average, `WIDE` for a size or a device, which may hold more.
    - `score`: the name of a score, a JSON file of scores or losses, or these themselves.
    - `text`: the text that the score reads, where it reads any; None: the recipe's calibration texts.
    - `held_out`: other text, on which the division must beat the best uniform scheme of the same size, or that is used.
    - `samples`: samples that are read of each of these texts; `length`: ids of each sample.
    - `granularity`: one scheme for each block, or for each linear; `fused`: linears that read one input get one scheme.
    - `solver`: `exact` (least sum of predicted losses) or `order` (layers are lifted in the order of their scores).

    Raises `BudgetError` and `RecipeError` for terms that do not fit together, `SchemeError` for levels that cannot exist.
    """

    average_bits: float | None = None
    size: str | int | None = None
    fits: str | int | None = None
    context: int = 2048
    batch: int = 1
    preset: str | None = None
    engine: str | None = None
    levels: str | Sequence[Scheme | str | None] | None = None
    score: str | Path | Scores | Losses = "weight-error"
    text: str | None = None
    held_out: str | None = None
    samples: int = SAMPLES
    length: int = LENGTH
    granularity: Granularity = "linear"
    fused: bool = False
    solver: Solver = "exact"

    def __post_init__(self) -> None:
        """Refuse terms that contradict each other, before anything is read."""
        given = self._given()
        _check_budgets(given)
        _check_number("average_bits", self.average_bits)
        if self.engine is not None and ENGINES.check(self.engine) in FILES_ONLY:
            raise not_served(self.engine)
        if self.preset is not None:
            _check_preset(self.preset, given)
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("solver", self.solver, get_args(Solver))
        _check_count("samples", self.samples, least=1)
        _check_count("length", self.length, least=2)
        if self.text is not None and self.text == self.held_out:
            raise RecipeError(
                f"{self.text} is both the text that scores read and the held-out one: the comparison would flatter the "
                "allocation; hold out another text"
            )
        _ = self.schemes, self.size_bytes, self.fits_bytes

    @property
    def asked(self) -> bool:
        """Whether there is a budget at all."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def schemes(self) -> tuple[Scheme | None, ...]:
        """The levels as schemes; None keeps a layer float."""
        usual = LEVELS if self.size is None and self.fits is None else WIDE
        return read_levels(usual if self.levels is None else self.levels)

    @property
    def size_bytes(self) -> int | None:
        """`size` in bytes."""
        return None if self.size is None else read_size(str(self.size))

    @property
    def fits_bytes(self) -> int | None:
        """`fits` in bytes."""
        return None if self.fits is None else read_size(str(self.fits))

    def named_score(self) -> str | Scores | Losses:
        """The name of a score, or scores and losses, read where a file is named. Raises `FormatError`."""
        if isinstance(self.score, (Scores, Losses)):
            return self.score
        return load_scores(Path(self.score)) if Path(self.score).suffix == ".json" else str(self.score)

    def _given(self) -> dict[str, Any]:
        """What is not as it is by default."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


def check_terms(recipe: Recipe, spending: Spending) -> None:
    """Refuse, before a model is opened, a recipe and a budget that do not go together, and texts that are not there.

    Raises `RecipeError` for a scheme beside a budget and for what reads text without one, `DataError` for a text that is not
    there or must not be `generated`.
    """
    if spending.asked and "scheme" in recipe.model_fields_set:
        raise RecipeError(
            f"the recipe has the scheme {recipe.scheme}, and a budget chooses every layer's scheme among spending.levels: "
            "leave out --scheme, [scheme] and --set scheme; [[overrides]] and --keep still apply"
        )
    _check_read(recipe, spending)
    read = () if recipe.calibration is None else recipe.calibration.texts
    for text in (*read, *([] if spending.text is None else [spending.text])):
        check_source(text, written=True)
    if spending.held_out is not None:
        check_source(spending.held_out)


def _check_read(recipe: Recipe, spending: Spending) -> None:
    """Refuse a preset, a score, a quantizer or a column rule that reads text where none is given. Raises `RecipeError`."""
    texts = () if recipe.calibration is None else recipe.calibration.texts
    if spending.preset not in (None, "fast") and not texts:
        raise RecipeError(f"preset {spending.preset} needs calibration text: {GIVE}; preset fast reads none")
    score = str(spending.score)
    if spending.asked and score.removeprefix("reverse:") in SCORES.reading and not (texts or spending.text):
        raise score_without_text(score)
    check_data(recipe)


def score_without_text(score: str) -> RecipeError:
    """For a score that reads text where there is none."""
    return RecipeError(
        f"score {score} reads text: {GIVE}; --text (--set spending.text) names a text for scores alone; zd reads none"
    )


def not_served(engine: str) -> RecipeError:
    """For an engine that only reads files."""
    return RecipeError(
        f"nothing is quantized for {engine}, which only reads files; write one of {', '.join(SERVING)}"
    )


def _check_number(what: str, value: object) -> None:
    if value is not None and not isinstance(value, Real):
        raise BudgetError(f"spending.{what} is {value!r}; it must be a number, such as 3.5")


def _check_count(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
        raise RecipeError(
            f"spending.{what} is {value!r}; it must be a whole number of at least {least}, below 2^62"
        )


def _check_budgets(given: dict[str, Any]) -> None:
    given = {name: value for name, value in given.items() if name != "engine"}
    count = sum(name in given for name in BUDGETS)
    if count == 0 and given and "preset" not in given:
        terms = ", ".join(f"spending.{name}" for name in given)
        raise BudgetError(f"{terms} only with a budget: {ONE_BUDGET}")
    if count > 1:
        raise BudgetError(ONE_BUDGET)


def _check_preset(name: str, given: dict[str, Any]) -> None:
    check_choice("preset", name, PRESETS)
    others = [term for term in given if term not in ("preset", "engine", "context", "batch", *BUDGETS)]
    if others:
        raise RecipeError(
            f"preset {name} chooses for itself and takes a budget and --for; leave out {', '.join(others)}"
        )
