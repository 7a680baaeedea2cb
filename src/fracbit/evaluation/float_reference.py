"""References to compare a model with: a float model that runs at the same time, or its kept predictions.

A sweep compares dozens of quantized models with one float model over one text. Running the float model each
time doubles the work, so its predictions can be kept: in memory (`Expected`), or in a file
(float_logits.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import DataError, WeightError
from fracbit.evaluation.divergence import Distribution, distribution
from fracbit.evaluation.logits import ScoredRows, run_order, scored_rows, vocabulary_of
from fracbit.evaluation.loss import broken_window
from fracbit.evaluation.windows import Windowing
from fracbit.records.progress import Progress

Predictions: TypeAlias = Callable[[slice], Distribution]
"""From a slice of a window's scored ids to the float model's distributions there."""


class Reference(Protocol):
    """A float model's predictions. vocabulary: how many ids it knows."""

    @property
    def vocabulary(self) -> int: ...

    def predictions(self, windows: Windowing, batch: int) -> Iterator[Predictions | None]:
        """Window by window in the order of scored_rows; None where nothing was kept.

        Raises: DataError when what was kept belongs to other windows.
        """
        ...


@dataclass(frozen=True, eq=False)
class Beside:
    """A float model that runs at the same time as the evaluated model."""

    model: PreTrainedModel

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.model)

    def predictions(self, windows: Windowing, batch: int) -> Iterator[Predictions | None]:
        for rows in scored_rows(self.model, windows, batch=batch):
            yield partial(expected_from, rows.logits)


@dataclass(frozen=True, eq=False)
class Expected:
    """Distributions kept in memory. windows: those of some windows, by index; key: of the windowing."""

    windows: Mapping[int, Distribution]
    key: str
    vocabulary: int

    def predictions(self, windows: Windowing, batch: int) -> Iterator[Predictions | None]:
        check_key(self.key, windows)
        for index in run_order(windows):
            kept = self.windows.get(index)
            yield None if kept is None else kept.__getitem__


def keep_expected(
    model: PreTrainedModel,
    windows: Windowing,
    *,
    room_bytes: int,
    batch: int = 8,
    progress: Progress | None = None,
) -> Expected:
    """Run the float model over the text and keep its predictions, longest windows first, in `room_bytes`.

    Probabilities and log-probabilities are both kept on the model's device, 8 bytes per logit. A comparison
    then costs one log-softmax, one multiplication and one sum. Windows that do not fit are left out and get
    no divergence.

    Raises: DataError, WeightError as judge does.
    """
    kept: dict[int, Distribution] = {}
    for done, rows in enumerate(scored_rows(model, windows, batch=batch), 1):
        size = 8 * rows.logits.numel()
        if size <= room_bytes:
            kept[rows.index] = expected = distribution(rows.logits)
            check_logs(rows, expected.logs)
            room_bytes -= size
        if progress is not None:
            progress("float model", done, len(windows.all))
    return Expected(kept, windows.key, vocabulary_of(model))


def expected_from(logits: Tensor, ids: slice) -> Distribution:
    """The distributions of some rows of logits [scored, vocabulary]."""
    return distribution(logits[ids])


def check_key(key: str, windows: Windowing) -> None:
    """Raises: DataError when predictions kept under `key` belong to another text or other windows."""
    if key != windows.key:
        raise DataError("the kept logits belong to another text, window, stride or BOS: make them again.")


def check_logs(rows: ScoredRows, logs: Tensor) -> None:
    """Raises: WeightError when log-probabilities [ids, vocabulary] of a window are NaN.

    One NaN logit makes its whole row NaN, so the first column is enough.
    """
    if bool(logs[:, 0].isnan().any()):
        raise WeightError(broken_window(rows, math.nan))
