"""What the lens of perturbation measured, as records, and what follows from them by arithmetic. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fracbit.errors import RecipeError
from fracbit.records.scores import Scores

Target: TypeAlias = Literal["weights", "activations", "both"]
EVERYWHERE = "all"
"""What a point calls its place when every layer was perturbed at once."""
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "weights": ("weights",),
    "activations": ("activations",),
    "both": ("weights", "activations"),
}
GRANULARITIES = ("block", "linear", "module")


@dataclass(frozen=True)
class LensPoint:
    """What one error cost.

    `kind` names the error, `target` what it was added to, `layers` where (`all`, or a unit's name); `intensity` is |delta|/|x|
    as measured over all perturbed tensors; `change` is the mean over seeds of the loss change in nats per token, `low` and
    `high` its 95 % interval, `changes` the seeds one by one.
    """

    kind: str
    target: str
    layers: str
    intensity: float
    change: float
    low: float
    high: float
    changes: tuple[float, ...]

    @property
    def sensitivity(self) -> float:
        """Loss change over squared relative intensity, nats; 0 where nothing was perturbed.

        It is what the layers would lose to an error as large as themselves if the loss were quadratic, and makes errors of
        unequal strength comparable.
        """
        return self.change / self.intensity**2 if self.intensity > 0 else 0.0

    def row(self) -> dict[str, str | float | int]:
        """The point as a line of a table."""
        return {
            "kind": self.kind, "target": self.target, "layers": self.layers, "intensity": self.intensity,
            "change": self.change, "low": self.low, "high": self.high, "seeds": len(self.changes),
        }  # fmt: skip


@dataclass(frozen=True)
class Additivity:
    """Whether the losses of single units add up: `parts` is their sum, `whole` the loss of all at once, in nats per token."""

    kind: str
    target: str
    parts: float
    whole: float

    @property
    def ratio(self) -> float:
        """The whole over its parts: above 1 the errors amplify each other; NaN when the parts cost nothing."""
        return self.whole / self.parts if self.parts else math.nan


@dataclass(frozen=True)
class LensReport:
    """What was measured: `base` nats per token on `tokens`, `curves` of the whole model, `effects` of units, `profiles`.

    - `model`: fingerprint of the model; `planted`: norms at which activation outliers were planted first.
    - `profiles`: scheme -> (mean |x| / rms, rms of the error / rms) over the weights of all linears.
    - `protocol`: intensity of the effects, seeds, tokens and text, for the scores that are made of them.
    """

    model: str
    base: float
    tokens: int
    curves: tuple[LensPoint, ...]
    effects: tuple[LensPoint, ...]
    profiles: Mapping[str, tuple[tuple[float, float], ...]]
    planted: int = 0
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def scores(self) -> Scores:
        """The sensitivities of weights as scores for `fracbit plan`. Raises `RecipeError` when no weights were perturbed."""
        weights = [point for point in self.effects if point.target == "weights"]
        if not weights:
            raise RecipeError(
                "scores are sensitivities of weights; look at weights or both, not at activations"
            )
        return sensitivity_scores(weights, weights[0].kind, self.model, self.protocol)


def sensitivity_scores(
    points: Sequence[LensPoint], kind: str, model: str, protocol: Mapping[str, Any]
) -> Scores:
    """The sensitivities of one kind of error as scores for an allocation; below 0 (noise) they count as 0.

    `model`: the fingerprint of the model that they were measured on.
    """
    values = {
        point.layers: max(point.sensitivity, 0.0)
        for point in points
        if point.kind == kind and point.layers != EVERYWHERE
    }
    return Scores(values, f"lens:{kind}", model, "sensitivity", protocol=protocol)


def additivity(points: Sequence[LensPoint]) -> list[Additivity]:
    """Do losses add up? For every kind and target of points of single units and of all at once."""
    found = []
    for kind, target in dict.fromkeys((point.kind, point.target) for point in points):
        here = [point for point in points if (point.kind, point.target) == (kind, target)]
        parts = sum(point.change for point in here if point.layers != EVERYWHERE)
        found += [
            Additivity(kind, target, parts, point.change) for point in here if point.layers == EVERYWHERE
        ]
    return found


def fragility(points: Sequence[LensPoint]) -> list[dict[str, str | float]]:
    """A line for each unit, the most fragile first: its sensitivity to each error, and to which it is most sensitive."""
    lines: list[dict[str, str | float]] = []
    for unit in dict.fromkeys(point.layers for point in points if point.layers != EVERYWHERE):
        here = {f"{point.target} {point.kind}": point.sensitivity for point in points if point.layers == unit}
        worst = max(here, key=lambda kind: here[kind])
        lines.append({"unit": unit, "most fragile to": worst, "sensitivity": here[worst], **here})
    return sorted(lines, key=lambda line: -float(line["sensitivity"]))
