"""Evaluation on a text: perplexity, and divergence from a float model, in a single pass.

The same code computes the loss with and without a reference, so it is equal to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import DataError, WeightError
from fracbit.evaluation.divergence import Divergence, divergence_of, token_divergence
from fracbit.evaluation.float_reference import Beside, Predictions, Reference
from fracbit.evaluation.logits import ScoredRows, row_chunks, scored_rows, vocabulary_of
from fracbit.evaluation.loss import Perplexity, default_window, finite_nll, perplexity_of, target_nll
from fracbit.evaluation.windows import Ids, Windowing, cut_windows
from fracbit.records.progress import Progress


@dataclass(frozen=True)
class Judgement:
    """Results of a model on a text. divergence: None without a reference, or if it kept no window."""

    perplexity: Perplexity
    divergence: Divergence | None

    def to_json(self) -> dict[str, object]:
        """The figures as JSON values; `divergence` is left out where there is none."""
        apart = {} if self.divergence is None else {"divergence": self.divergence.to_json()}
        return {**self.perplexity.to_json(), **apart}


def judge(
    model: PreTrainedModel,
    windows: Windowing,
    *,
    batch: int = 8,
    reference: PreTrainedModel | Reference | None = None,
    progress: Progress | None = None,
) -> Judgement:
    """Measure `model` on a text in one pass: its loss, and its divergence from `reference` if there is one.

    windows: of cut_windows. batch: windows run together. reference: a float model, which then runs at the same
    time, or its kept predictions (keep_expected, open_logits). progress: called after each window. Losses are
    fp32 for every dtype of the model.

    Raises: DataError (windows or ids that do not fit the model, different vocabularies, a reference kept for
    another text), WeightError (NaN logits, infinite loss).
    """
    started, aside = time.perf_counter(), 0.0
    predictions = _predictions(reference, model, windows, batch)
    sums = [0.0] * len(windows.all)  # nats of each window
    divergences: list[Tensor] = []
    same = 0
    for done, rows in enumerate(scored_rows(model, windows, batch=batch), 1):
        paused = time.perf_counter()
        expected = next(predictions)
        aside += time.perf_counter() - paused
        judged = _judge_window(rows, expected)
        sums[rows.index] = judged.nats
        divergences += judged.divergences
        same += judged.same
        if progress is not None:
            progress("perplexity", done, len(windows.all))
    seconds = time.perf_counter() - started
    loss = perplexity_of(windows, sums, seconds - aside)
    if not divergences:
        return Judgement(loss, None)
    return Judgement(loss, divergence_of(torch.cat(divergences), same, windows.protocol, seconds))


def perplexity(
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of `model` over one stream of ids or over separate documents: a short form of judge.

    ids: a 1-D tensor (one stream), or a sequence of them (documents that do not see each other). window:
    ids seen at once (default: the model's positions, at most 2048). stride, bos: see cut_windows. batch,
    progress, errors: see judge.
    """
    window = default_window(model) if window is None else window
    windows = cut_windows(ids, window=window, stride=stride, bos=bos)
    return judge(model, windows, batch=batch, progress=progress).perplexity


@dataclass(frozen=True)
class _Window:
    """One window's part. nats: its loss; divergences: KL of its ids, fp32 [ids] of each chunk, on the CPU;
    same: ids with equal top tokens.
    """

    nats: float
    divergences: list[Tensor]
    same: int


def _judge_window(rows: ScoredRows, predictions: Predictions | None) -> _Window:
    nats, same = 0.0, 0
    divergences: list[Tensor] = []
    for chunk in row_chunks(*rows.logits.shape):
        logits = rows.logits[chunk]  # [ids, vocabulary]
        logs = torch.log_softmax(logits.float(), dim=1)  # [ids, vocabulary]
        nats += float(target_nll(logs, rows.targets[chunk]).double().sum())
        if predictions is not None:
            expected = predictions(chunk).to(logits.device)
            divergences.append(token_divergence(expected, logs).cpu())  # [ids]
            same += int((expected.top == logits.argmax(1)).sum())
    nats = finite_nll(rows, nats)
    if not all(bool(values.isfinite().all()) for values in divergences):
        raise WeightError(
            f"the divergence in window {rows.index} ({rows.window}) is not finite: one of the two models "
            "has NaN or infinite logits there."
        )
    return _Window(nats, divergences, same)


def _predictions(
    reference: PreTrainedModel | Reference | None, model: PreTrainedModel, windows: Windowing, batch: int
) -> Iterator[Predictions | None]:
    """The predictions of the reference, window by window; always None without a reference."""
    if reference is None:
        return repeat(None)
    reference = Beside(reference) if isinstance(reference, PreTrainedModel) else reference
    if reference.vocabulary != vocabulary_of(model):
        raise DataError(
            f"the float model has {reference.vocabulary} tokens in its vocabulary, the quantized one "
            f"{vocabulary_of(model)}: they are different models, and their predictions cannot be compared."
        )
    return reference.predictions(windows, batch)
