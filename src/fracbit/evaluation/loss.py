"""The loss of a text in nats per token, and its perplexity: how surprised a model is by text it has not seen.

perplexity = exp(nll), nll = mean over scored ids of -ln p(id | the ids before it in its window).

The windows are those of the transformers documentation. Two details are exact here and not there. The mean is
over the scored ids; the documentation weights a window by its scored ids minus one, even if the first of them
has context. And a last window of one id, which predicts nothing, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import WeightError
from fracbit.evaluation.logits import ScoredRows, longest_window
from fracbit.evaluation.windows import Protocol, Windowing

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text.

    perplexity: exp(nll). nll: nats per scored token. tokens: scored ids. seconds: wall clock of the whole
    measurement, without the reference. tokens_per_second: ids fed to the model per second, overlap
    included. window_nll, window_tokens: nats and scored ids of each window in the order of the text, for
    confidence intervals by resampling.
    """

    perplexity: float
    nll: float
    tokens: int
    protocol: Protocol
    seconds: float
    tokens_per_second: float
    window_nll: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)

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


def default_window(model: PreTrainedModel) -> int:
    """The window used when none is asked for, in ids: the model's positions, at most 2048."""
    return min(longest_window(model) or DEFAULT_WINDOW, DEFAULT_WINDOW)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row, fp32 [tokens]. logits: [tokens, vocabulary], any float dtype."""
    return target_nll(torch.log_softmax(logits.float(), dim=1), targets)


def target_nll(logs: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row, fp32 [tokens]. logs: log-probabilities, fp32 [tokens, vocabulary]."""
    return -logs.gather(1, targets[:, None]).squeeze(1)  # [tokens]


def finite_nll(rows: ScoredRows, total: float) -> float:
    """`total`, a window's sum in nats. Raises: WeightError when it is NaN or infinite."""
    if not math.isfinite(total):
        raise WeightError(broken_window(rows, total))
    return total


def broken_window(rows: ScoredRows, value: float) -> str:
    """The error text for a window whose loss or divergence is NaN or infinite."""
    return (
        f"the model's loss in window {rows.index} ({rows.window}) is {value}: a weight is NaN or infinite, or an "
        "activation overflows. Evaluate with dtype float32, or quantize again."
    )


def perplexity_of(windows: Windowing, sums: list[float], seconds: float) -> Perplexity:
    """The record of a finished measurement. sums: nats of each window."""
    nll = math.fsum(sums) / windows.protocol.tokens
    fed = sum(len(windows.inputs(window)) for window in windows.all)
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        tokens=windows.protocol.tokens,
        protocol=windows.protocol,
        seconds=seconds,
        tokens_per_second=fed / max(seconds, 1e-9),
        window_nll=tuple(sums),
        window_tokens=tuple(window.scored for window in windows.all),
    )


def _exp(nll: float) -> float:
    """exp, or inf where a double overflows (nll above 709): a collapsed model has a perplexity too."""
    return math.exp(nll) if nll < 709 else math.inf
