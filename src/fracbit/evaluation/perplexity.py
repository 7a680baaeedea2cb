"""Perplexity: how surprised a model is by text it has not seen, with windows and stride.

perplexity = exp(nll), nll = mean over scored ids of -ln p(id | the ids before it in its window), in nats
per token.

The windows are those of the transformers documentation. Two details are exact here and not there: the mean
runs over the scored ids themselves (the documentation weights a window by its scored ids minus one, also
where the first of them has context), and a last window of one id, which predicts nothing, is left out.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import WeightError
from fracbit.evaluation.logits import Progress, ScoredRows, longest_window, row_chunks, scored_rows
from fracbit.evaluation.windows import Ids, Protocol, Windowing, plan_windows

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """What a text cost the model.

    perplexity: exp(nll). nll: nats per scored token. tokens: scored ids. seconds: wall clock of the whole
    measurement. tokens_per_second: ids fed to the model per second, overlap included. window_nll,
    window_tokens: nats and scored ids of each window in the order of the text, for confidence intervals by
    resampling.
    """

    perplexity: float
    nll: float
    tokens: int
    protocol: Protocol
    seconds: float
    tokens_per_second: float
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]

    def to_json(self) -> dict[str, object]:
        """The record as JSON values, without the sums of single windows; an overflowed perplexity is null."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "nll": self.nll,
            "tokens": self.tokens,
            "protocol": {**self.protocol.to_json(), "text": str(self.protocol)},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


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
    """Measure the perplexity of `model` over one stream of ids or over separate documents.

    ids: a 1-D tensor (one stream), or a sequence of them (documents that do not see each other). window:
    ids seen at once (default: the model's positions, at most 2048). stride: see plan_windows. bos: id put
    before every window. batch: windows run together. progress: called with (windows done, windows in all).
    Scores are fp32 whatever the model's dtype.

    Raises: DataError (impossible window or stride, empty text, foreign ids), WeightError (NaN logits,
    infinite loss).
    """
    started = time.perf_counter()
    window = default_window(model) if window is None else window
    plan = plan_windows(ids, window=window, stride=stride, bos=bos)
    sums = [0.0] * len(plan.windows)
    for rows in scored_rows(model, plan, batch=batch, progress=progress):
        sums[rows.index] = window_nll(rows)
    return summarize(plan, sums, time.perf_counter() - started)


def default_window(model: PreTrainedModel) -> int:
    """The window used when none is asked for, in ids."""
    return min(longest_window(model) or DEFAULT_WINDOW, DEFAULT_WINDOW)


def window_nll(rows: ScoredRows) -> float:
    """Sum of the negative log-likelihoods of a window's scored ids, in nats.

    Raises: WeightError when the sum is NaN or infinite.
    """
    total = 0.0
    for chunk in row_chunks(*rows.logits.shape):
        total += float(token_nll(rows.logits[chunk], rows.targets[chunk]).double().sum())
    return finite_nll(rows, total)


def finite_nll(rows: ScoredRows, total: float) -> float:
    """`total`, a window's sum in nats. Raises: WeightError when it is NaN or infinite."""
    if not math.isfinite(total):
        raise WeightError(broken_window(rows, total))
    return total


def broken_window(rows: ScoredRows, value: float) -> str:
    """What to say about a window whose loss or divergence is NaN or infinite."""
    return (
        f"the model's predictions in window {rows.index} ({rows.window}) come to {value}: a weight is NaN or "
        "infinite, or an activation overflows. Evaluate with dtype float32, or quantize again."
    )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row, fp32 [tokens]. logits: [tokens, vocabulary], any float dtype."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def summarize(plan: Windowing, sums: list[float], seconds: float) -> Perplexity:
    """The record of a finished measurement. sums: nats of each window of the plan."""
    nll = math.fsum(sums) / plan.protocol.tokens
    fed = sum(len(plan.inputs(window)) for window in plan.windows)
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        tokens=plan.protocol.tokens,
        protocol=plan.protocol,
        seconds=seconds,
        tokens_per_second=fed / max(seconds, 1e-9),
        window_nll=tuple(sums),
        window_tokens=tuple(window.scored for window in plan.windows),
    )


def _exp(nll: float) -> float:
    """exp, with inf where a double ends (nll above 709): a collapsed model has a perplexity too."""
    return math.exp(nll) if nll < 709 else math.inf
