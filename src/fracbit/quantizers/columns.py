"""Which input columns of a linear stay in 16 bits: the rules of `COLUMN_RULES`, each a score of columns.

- `cost`: rounding column j alone adds h_j sum_o (w_oj - q_oj)^2 to the error of the output, with h_j the energy of that input:
  the diagonal of the objective that GPTQ minimises. Without statistics every input counts the same.
- `activation`: the energy of the input on calibration text.
- `proxy`: outlier-dependent quantization (arXiv:2212.09720, Sec. 3, Eq. 2), which needs no data: a unit that produces outlier
  activations has weights of unusually large standard deviation, so the spread of the producing layer scores the columns of the
  consuming one.
- `random`: the control.

A share p of columns costs p (16 - k) bits per weight and 4 bytes a column for its number, all of it in `stored_bits`. Sparse
single weights (SpQR, Dettmers et al. 2023, arXiv:2306.03078) are not offered: each costs 16 bits and its place, and every
kernel would need a second, irregular product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.packed import decode
from fracbit.numerics.ranges import quantize_tensor
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class LinearView:
    """What a rule may look at: a `weight` fp32 [out, in], its scheme, the statistics of its inputs, and the standard deviation
    `producer_spread` [in] of the weights that produce each input. `generator` is what chance draws from.
    """

    weight: Tensor
    scheme: Scheme
    stats: Stats | None
    producer_spread: Tensor | None
    generator: torch.Generator


@dataclass(frozen=True)
class Rule:
    """One line of the table: `score` gives every column a number, and the largest stay in 16 bits.

    `needs` is what it uses besides the weight of a linear: any of "energy", "producers" and "chance". A rule that looks at
    neither weight nor statistics is `ahead`: its columns are chosen before the run.
    """

    score: Callable[[LinearView], Tensor]
    needs: frozenset[str] = frozenset()
    ahead: bool = False

    def __call__(
        self,
        weight: Tensor,
        scheme: Scheme,
        stats: Stats | None,
        *,
        count: int,
        generator: torch.Generator,
        producer_spread: Tensor | None = None,
    ) -> Tensor:
        """Numbers int32 [count], ascending, of the columns of `weight` [out, in] to keep; ties go to the earlier column.

        Raises `WeightError` where something that the rule needs is missing.
        """
        view = LinearView(weight.float(), scheme, stats, producer_spread=producer_spread, generator=generator)
        scores = self.score(view)  # [in]
        order = scores.argsort(descending=True, stable=True)
        return order[:count].sort().values.to(torch.int32)  # [count]


def cost(view: LinearView) -> Tensor:
    """What rounding each column alone adds to the error of the output."""
    error = view.weight - decode(quantize_tensor(view.weight, view.scheme))  # [out, in]
    squares = error.square().sum(0)  # [in]
    return squares if view.stats is None else squares * view.stats.energy


def activation(view: LinearView) -> Tensor:
    """The energy that each input had on calibration text."""
    if view.stats is None:
        raise WeightError(
            "column rule activation reads the energy of the inputs, and no calibration token reached this layer; "
            "use more samples, or the rule cost or proxy"
        )
    return view.stats.energy


def proxy(view: LinearView) -> Tensor:
    """The spread of the weights that produce each input."""
    if view.producer_spread is None:
        raise WeightError(
            "column rule proxy reads the layer that produces the inputs, and none is known here; use the rule cost"
        )
    return view.producer_spread


def chance(view: LinearView) -> Tensor:
    """A random order of the columns."""
    width = view.weight.shape[1]
    scores = torch.empty(width)  # [in]
    scores[torch.randperm(width, generator=view.generator)] = torch.arange(width, 0, -1.0)
    return scores


COST = Rule(cost)
ACTIVATION = Rule(activation, frozenset({"energy"}))
PROXY = Rule(proxy, frozenset({"producers"}), ahead=True)
RANDOM = Rule(chance, frozenset({"chance"}), ahead=True)
