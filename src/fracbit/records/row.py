"""`Run`: one experiment, everything that decides what it measures. `Row`: what came out, written once under the run's key.

A run is a recipe plus what only studies vary: input columns kept in 16 bits (proxy quantization, arXiv:2212.09720, Sec. 3), a
correction, and the text on which it is judged. Total model bits follow that paper: every stored bit of the quantized linears,
plus all other parameters at the width of the source checkpoint, embeddings included; a tied head is counted once.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fracbit.errors import RecipeError
from fracbit.records.recipe import Override, Recipe

Choice = Literal["proxy", "random", "activation"]
_OUTLIERS = re.compile(r"(proxy|random|activation):(0?\.\d+|\d+(?:\.\d+)?%)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Outliers(_Frozen):
    """Input columns kept in 16 bits: a `share` of every linear's columns, above 0 and below 1.

    `chosen`: "proxy", by the weight std of the units that produce them; "random", the control; "activation", by the energy
    they had on calibration text.
    """

    chosen: Choice
    share: float = Field(gt=0, lt=1)

    def __str__(self) -> str:
        return f"{self.chosen}:{self.share:g}"


def outliers_of(text: str) -> Outliers | None:
    """Read `none`, `proxy:0.02`, `random:2%`, `activation:0.01`. Raises `RecipeError` for anything else."""
    if text == "none":
        return None
    match = _OUTLIERS.fullmatch(text)
    share = 0.0
    if match:
        share = float(match.group(2).removesuffix("%")) / (100 if match.group(2).endswith("%") else 1)
    if match is None or not 0 < share < 1:
        raise RecipeError(
            f"outliers {text!r}: write none, proxy:0.02, random:0.02 or activation:0.02 (a share below 1)"
        )
    return Outliers(chosen=match.group(1), share=share)


def _outliers(value: object) -> object:
    return outliers_of(value) if isinstance(value, str) else value


class Evaluation(_Frozen):
    """On what a run is judged: `text`, a source of the data room, seen in windows of `window` ids; `tasks` for zero-shot.

    `window` and `stride` as for `fracbit eval`; None is the model's own length. `tasks` are names of lm-eval, or the YAML files
    of local tasks; `limit` examples of each, None for all.
    """

    text: str
    window: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None


class Calibration(_Frozen):
    """What data-driven quantizers and activation-chosen columns see: `samples` pieces of `length` ids of `text`."""

    text: str
    samples: int = Field(default=32, gt=0)
    length: int = Field(default=256, gt=0)


class Run(_Frozen):
    """One experiment."""

    recipe: Recipe
    evaluation: Evaluation
    outliers: Annotated[Outliers | None, BeforeValidator(_outliers)] = None
    correction: str = "none"
    calibration: Calibration | None = None

    @property
    def quantized(self) -> bool:
        """False for a float baseline, whose every layer is kept."""
        return KEEP_ALL not in self.recipe.overrides

    def __str__(self) -> str:
        return label(self)


KEEP_ALL = Override(layers="*", keep=True)
"""The override of a baseline run: no layer is quantized."""


def run_key(run: Run) -> str:
    """16 hex digits that name the run: equal runs, and only they, have equal keys.

    What has its default value is left out, so that a field that recipes gain later does not rename the rows of old stores.
    """
    text = json.dumps(run.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label(run: Run) -> str:
    """One line for people: `tales-s nf4/64`, `tales-s int3/64 gptq proxy:0.02`, `tales-s float`."""
    name = run.recipe.model.rstrip("/").rsplit("/", 1)[-1]
    if not run.quantized:
        return f"{name} float"
    parts = [name, str(run.recipe.scheme)]
    parts += [run.recipe.quantizer] if run.recipe.quantizer != "rtn" else []
    parts += ["search"] if run.recipe.search else []
    parts += [str(run.outliers)] if run.outliers else []
    parts += [run.correction] if run.correction != "none" else []
    return " ".join(parts)


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
