"""Corrections that a grid may name: what is done to the quantized model before it is judged.

To add one, write a function of (model, family, run) and a line in `CORRECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fracbit.models.family import Family
    from fracbit.records.row import Run


@dataclass(frozen=True)
class Correction:
    """One line of the table. `needs_text`: whether `apply` reads the run's calibration text."""

    apply: Callable[[PreTrainedModel, Family, Run], None]
    needs_text: bool = False


def leave(model: PreTrainedModel, family: Family, run: Run) -> None:
    """No correction: the quantized model is judged as it is."""


CORRECTIONS: dict[str, Correction] = {
    "none": Correction(leave),
}
