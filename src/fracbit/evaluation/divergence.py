"""How far a quantized model's predictions are from the float model's, token by token.

KL(float || quantized) = sum_w p(w) (ln p(w) - ln q(w)), p the float and q the quantized model's next-token
distribution, in nats; and how often both name the same most likely token. Perplexity can stay equal while
two models say different things; the divergence cannot, and it needs far less text for the same confidence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import DataError, WeightError
from fracbit.evaluation.float_logits import FloatLogits, reference_rows
from fracbit.evaluation.logits import Progress, ScoredRows, row_chunks, scored_rows, vocabulary_of
from fracbit.evaluation.perplexity import Perplexity, default_window, summarize, window_nll
from fracbit.evaluation.windows import Ids, Protocol, Windowing, plan_windows


@dataclass(frozen=True)
class Divergence:
    """KL(float || quantized) in nats per token, over the scored ids of a text.

    kl: mean. kl_median, kl_p99, kl_max: of single tokens. agreement: share of tokens, 0..1, where both
    models have the same most likely next token. tokens: how many. seconds: wall clock.
    """

    kl: float
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: float
    tokens: int
    protocol: Protocol
    seconds: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} nats per token (99 % below {self.kl_p99:.4f}, at most {self.kl_max:.4f}), "
            f"same top token {100 * self.agreement:.2f} %"
        )

    def to_json(self) -> dict[str, object]:
        """The record as JSON values."""
        return {**asdict(self), "protocol": {**self.protocol.to_json(), "text": str(self.protocol)}}


def divergence(
    reference: PreTrainedModel | FloatLogits,
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Divergence:
    """Measure how far `model` is from `reference`, the float model or its kept logits. Arguments as for
    perplexity.

    Raises: DataError (windows, ids, two vocabularies, logits kept for another text), WeightError (NaN, Inf).
    """
    return compare(
        reference, model, ids, window=window, stride=stride, bos=bos, batch=batch, progress=progress
    )[1]


def compare(
    reference: PreTrainedModel | FloatLogits,
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> tuple[Perplexity, Divergence]:
    """Perplexity and divergence of `model` from a single pass over the text; see both for arguments and
    errors.
    """
    started = time.perf_counter()
    window = default_window(model) if window is None else window
    plan = plan_windows(ids, window=window, stride=stride, bos=bos)
    _check_vocabularies(reference, model)
    nlls = [0.0] * len(plan.windows)
    divergences: list[Tensor] = []
    same = 0
    ours = scored_rows(model, plan, batch=batch, progress=progress)
    for theirs, rows in zip(_rows_of(reference, plan, batch), ours, strict=True):
        nlls[rows.index] = window_nll(rows)
        divergences.append(_window_divergence(theirs, rows))
        same += _same_top(theirs, rows)
    seconds = time.perf_counter() - started
    return summarize(plan, nlls, seconds), _summarize(plan, torch.cat(divergences), same, seconds)


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each row in nats, fp32 [tokens]; rounding below zero is cut off.

    reference, logits: [tokens, vocabulary], unnormalized, any float dtype. A word that the reference rules
    out (-inf) adds nothing.
    """
    p = torch.log_softmax(reference.float(), dim=1)
    q = torch.log_softmax(logits.float(), dim=1)
    terms = torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(dim=1).clamp_min(0)


def _rows_of(reference: PreTrainedModel | FloatLogits, plan: Windowing, batch: int) -> Iterator[ScoredRows]:
    if isinstance(reference, FloatLogits):
        return reference_rows(reference, plan)
    return scored_rows(reference, plan, batch=batch)


def _window_divergence(theirs: ScoredRows, ours: ScoredRows) -> Tensor:
    """KL of each scored id of a window, fp32 [scored], on the CPU."""
    parts = [
        token_divergence(theirs.logits[chunk].to(ours.logits.device), ours.logits[chunk])
        for chunk in row_chunks(*ours.logits.shape)
    ]
    result = torch.cat(parts).cpu()
    if not bool(result.isfinite().all()):
        raise WeightError(
            f"the divergence in window {ours.index} ({ours.window}) is not finite: one of the two models "
            "has NaN or infinite logits there."
        )
    return result


def _same_top(theirs: ScoredRows, ours: ScoredRows) -> int:
    return int((theirs.logits.argmax(1).cpu() == ours.logits.argmax(1).cpu()).sum())


def _summarize(plan: Windowing, values: Tensor, same: int, seconds: float) -> Divergence:
    ordered = values.double().sort().values
    last = len(ordered) - 1
    return Divergence(
        kl=float(ordered.mean()),
        kl_median=float(ordered[last // 2]),
        kl_p99=float(ordered[round(0.99 * last)]),
        kl_max=float(ordered[last]),
        agreement=same / len(ordered),
        tokens=len(ordered),
        protocol=plan.protocol,
        seconds=seconds,
    )


def _check_vocabularies(reference: PreTrainedModel | FloatLogits, model: PreTrainedModel) -> None:
    theirs = reference.vocabulary if isinstance(reference, FloatLogits) else vocabulary_of(reference)
    if theirs != vocabulary_of(model):
        raise DataError(
            f"the float model has {theirs} words and the quantized one {vocabulary_of(model)}: they are not "
            "the same model, and their predictions cannot be compared."
        )
