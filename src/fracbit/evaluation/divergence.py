"""How far a quantized model's predictions are from the float model's, token by token.

KL(float || quantized) = sum_w p(w) (ln p(w) - ln q(w)) in nats. p is the next-token distribution of the float
model, q that of the quantized one. Agreement is the share of tokens where both have the same most likely token.
Perplexity can stay equal while predictions change. The divergence cannot, and it needs far less text for the
same confidence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fracbit.evaluation.windows import Protocol


@dataclass(frozen=True)
class Divergence:
    """KL(float || quantized) in nats per token, over the scored ids of a text.

    kl: mean. kl_median, kl_p99, kl_max: of single tokens. agreement: share of tokens, 0..1, where both
    models have the same most likely next token. tokens: number of compared tokens, fewer than the
    protocol's if the reference was kept for some windows only. seconds: wall clock of the whole
    measurement, the reference included.
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
        part = (
            ""
            if self.tokens == self.protocol.tokens
            else f", over the {self.tokens} tokens that the reference kept"
        )
        return (
            f"KL {self.kl:.5f} nats per token (99 % below {self.kl_p99:.4f}, at most {self.kl_max:.4f}), "
            f"same top token {100 * self.agreement:.2f} %{part}"
        )

    def to_json(self) -> dict[str, object]:
        """The record as JSON values."""
        return {**asdict(self), "protocol": {**self.protocol.to_json(), "text": str(self.protocol)}}


@dataclass(frozen=True, eq=False)
class Distribution:
    """The float model's predictions at some ids. logs, chances: log-probabilities and probabilities, fp32
    [ids, vocabulary]; top: the most likely tokens, int64 [ids].
    """

    logs: Tensor
    chances: Tensor
    top: Tensor

    def __getitem__(self, ids: slice) -> Distribution:
        return Distribution(self.logs[ids], self.chances[ids], self.top[ids])

    def to(self, device: torch.device) -> Distribution:
        """The same on `device`; not copied if it is already there."""
        return Distribution(self.logs.to(device), self.chances.to(device), self.top.to(device))


def distribution(logits: Tensor) -> Distribution:
    """The distributions of logits [ids, vocabulary], unnormalized, any float dtype."""
    logs = torch.log_softmax(logits.float(), dim=1)  # [ids, vocabulary]
    return Distribution(logs, chances=logs.exp(), top=logits.argmax(1))


def token_divergence(expected: Distribution, logs: Tensor) -> Tensor:
    """KL(expected || logs) of each row in nats, fp32 [ids]; negative values from rounding become 0.

    logs: the quantized model's log-probabilities, fp32 [ids, vocabulary]. A token with probability 0 in the
    float model (-inf) adds nothing.
    """
    found = (expected.logs - logs).mul_(expected.chances).sum(dim=1)  # [ids]
    if not bool(found.isfinite().all()):  # -inf times 0 is rare, so it is handled only here
        terms = expected.chances * (expected.logs - logs)  # [ids, vocabulary]
        found = terms.masked_fill_(expected.logs == -torch.inf, 0).sum(dim=1)  # [ids]
    return found.clamp_min(0)


def divergence_of(values: Tensor, same: int, protocol: Protocol, seconds: float) -> Divergence:
    """The record of a finished measurement. values: KL of each token, fp32 [tokens]; same: equal top tokens."""
    ordered = values.double().sort().values  # [tokens]
    last = len(ordered) - 1
    return Divergence(
        kl=float(ordered.mean()),
        kl_median=float(ordered[last // 2]),
        kl_p99=float(ordered[round(0.99 * last)]),
        kl_max=float(ordered[last]),
        agreement=same / len(ordered),
        tokens=len(ordered),
        protocol=protocol,
        seconds=seconds,
    )
