"""`Run`: one experiment, everything that decides what it measures. `Row`: what came out, written once under the run's key.

Total model bits follow arXiv:2212.09720: every stored bit of the quantized linears, plus all other parameters at the width of
the source checkpoint, embeddings included; a tied head is counted once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fracbit.records.recipe import Override, Recipe


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Evaluation(_Frozen):
    """What a run is evaluated on: `text`, a source of the data package, in windows of `window` ids; zero-shot `tasks`.

    `window` and `stride` as for `fracbit eval`; None is the model's own length. `tasks` are names of lm-eval, or the YAML files
    of local tasks; `limit` examples of each, None for all.
    """

    text: str
    window: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None


class Run(_Frozen):
    """One experiment: what is done to a model, and on what it is judged."""

    recipe: Recipe
    evaluation: Evaluation

    @model_validator(mode="before")
    @classmethod
    def _of_version_01(cls, data: Any) -> Any:
        """A run as stores of version 0.1 hold it: columns, correction and calibration text beside the recipe.

        That version calibrated every block on the float model's states, and drew the samples with seed 0 whatever the run's.
        """
        if not is_old(data):
            return data
        recipe = {"search": False, **data["recipe"]}
        if data.get("outliers"):
            recipe["outliers"] = data["outliers"]
        if data.get("calibration"):
            if not str(recipe.get("outliers")).startswith("random"):
                recipe.pop("seed", None)
            old = data["calibration"]
            tweak = str(data.get("correction", "none")).removeprefix("tweak-")
            sizes = {name: old.get(name, size) for name, size in OLD_SAMPLES.items()}
            recipe["calibration"] = {"texts": [old["text"]], **sizes, "chain": "float", "tweak": tweak}
        return {"recipe": recipe, "evaluation": data["evaluation"]}

    @property
    def quantized(self) -> bool:
        """False for a float baseline, whose every layer is kept."""
        return KEEP_ALL not in self.recipe.overrides

    @property
    def chain(self) -> str:
        """On whose outputs blocks were calibrated, `quantized` or `float`; "" where no calibration data was read."""
        return "" if self.recipe.calibration is None else self.recipe.calibration.chain

    @property
    def correction(self) -> str:
        """The correction after each block; `none` where there is none."""
        return "none" if self.recipe.calibration is None else self.recipe.calibration.tweak

    def __str__(self) -> str:
        return label(self)


def is_old(data: object) -> bool:
    """Whether a run is written as stores of version 0.1 hold it."""
    return isinstance(data, Mapping) and bool({"outliers", "correction", "calibration"} & data.keys())


OLD_SAMPLES = {"samples": 32, "length": 256}
OLD_ROW = "measured by fracbit 0.1, on the float chain, with samples of seed 0"
KEEP_ALL = Override(layers="*", keep=True)
"""The override of a baseline run: no layer is quantized."""


def run_key(run: Run) -> str:
    """16 hex digits that name the run: equal runs, and only they, have equal keys.

    What has its default value is left out, so that a field that recipes gain later does not rename the rows of old stores.
    """
    text = json.dumps(run.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def given(record: BaseModel) -> dict[str, Any]:
    """The fields of a record that differ from their defaults, by name. Fields without a default are always included."""
    fields = type(record).model_fields
    usual = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: value for name, value in record if fields[name].is_required() or value != usual[name]}


READ_AS = ("model", "revision", "trust_remote_code")
"""Fields of a recipe that say which model it is for."""
SAMPLED = ("texts", "samples", "length", "batch")
"""Fields of a calibration that say what it reads."""


def settings(recipe: Recipe) -> dict[str, Any]:
    """How a recipe differs from rounding the linears to its scheme: fields that differ from their defaults, by name.

    Fields of the calibration are included, except those that say what it reads. Fields that a recipe gains later are
    included too.
    """
    plan = {} if recipe.calibration is None else given(recipe.calibration)
    found = given(recipe) | plan
    apart = (*READ_AS, "scheme", "calibration", *SAMPLED)
    seed = {"seed": recipe.seed} if "seed" in found else {}
    return {name: value for name, value in found.items() if name not in (*apart, "seed")} | seed


Words = Mapping[str, Callable[[Any], str]]


def worded(found: Mapping[str, Any], words: Words) -> list[str]:
    """Settings in words: first those of `words`, in its order, then all others as `name value`, or only the name for true."""
    known = [say(found[name]) for name, say in words.items() if name in found]
    others = {name: value for name, value in found.items() if name not in words}
    return [*known, *(name if value is True else f"{name} {value}" for name, value in others.items())]


_SHORT: Words = {
    "quantizer": str,
    "search": lambda _: "search",
    "outliers": str,
    "chain": lambda chain: f"{chain} chain",
    "transforms": "+".join,
    "inputs": str,
    "tweak": lambda name: f"tweak-{name}",
    "overrides": lambda overrides: f"{len(overrides)} overrides",
}


def label(run: Run) -> str:
    """One line for people: `tales-s nf4/64`, `tales-s int3/64 gptq proxy:0.02 seed 1`, `tales-s float`.

    It has the model's name as in the recipe, the scheme, and every setting that differs from its default. So two runs of one
    sweep never have the same label.
    """
    recipe = run.recipe
    name = recipe.model + (f"@{recipe.revision}" if recipe.revision else "")
    if not run.quantized:
        return f"{name} float"
    return " ".join([name, str(recipe.scheme), *worded(settings(recipe), _SHORT)])


class Row(_Frozen):
    """What came out of a run.

    - `status`: "done" or "failed"; a failed row says why in `error` and has none of the figures.
    - `parameters` of the model (a tied head once), `weights` of them quantized, which take `stored_bits`; `model_bits` are
      the bits of the whole model, `bits_per_weight` = stored_bits / weights, `bits_per_parameter` = model_bits / parameters.
    - `nll` nats per token, `perplexity` = exp(nll), None above exp(709); `window_nll` nats and `window_tokens` ids of each
      window in text order, for the bootstrap; `divergence` nats per token, KL(float || this), and `agreement`, the share of
      positions with the float model's first choice, both None where the float logits were too large to keep.
    - `weight_error`: squared error of all quantized weights relative to their power.
    - `accuracies`: task -> share in [0, 1].
    - `seconds` of the whole run, of which `evaluation_seconds` were evaluation; loading the model is not part of a run.
    """

    key: str
    run: Run
    status: Literal["done", "failed"]
    error: str | None = None
    family: str = ""
    parameters: int = 0
    weights: int = 0
    stored_bits: int = 0
    model_bits: int = 0
    weight_error: float | None = None
    nll: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    window_nll: tuple[float, ...] = ()
    window_tokens: tuple[int, ...] = ()
    accuracies: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    device: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    text_sha256: str = ""
    notes: tuple[str, ...] = ()
    created: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_version_01(cls, data: Any) -> Any:
        """A row of version 0.1 under the key that its run has now; one that was calibrated says by what."""
        if not isinstance(data, Mapping) or not is_old(data.get("run")):
            return data
        run = Run.model_validate(data["run"])
        notes = [*data.get("notes", ()), *([OLD_ROW] if run.recipe.calibration else [])]
        return {**data, "key": run_key(run), "run": run, "notes": notes}

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per quantized weight; None where nothing was quantized."""
        return self.stored_bits / self.weights if self.weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits of the whole model per parameter; None for a failed row."""
        return self.model_bits / self.parameters if self.parameters else None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, derived figures included."""
        data = self.model_dump(mode="json")
        return {
            **data,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
        }


def failed_row(run: Run, error: str, notes: tuple[str, ...] = ()) -> Row:
    """The row of a run that could not even start."""
    return Row(key=run_key(run), run=run, status="failed", error=error, notes=notes)
