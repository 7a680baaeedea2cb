"""`LayerView`: all that a score may look at, of one unit: a whole block, a single linear, or linears kept together.

The pipeline fills only what the score asks for (`ScoreMethod.needs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fracbit.numerics.packed import decode
from fracbit.numerics.ranges import quantize_tensor
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class LayerView:
    """One unit of a model as tensors and numbers.

    - `name`; `index` of `count`: its place in the order of use.
    - `weights`: linear name -> [out, in] fp32; `stats`: linear name -> inputs seen (with `gram`).
    - `gradients`: linear name -> [out, in], of the mean loss in nats per token.
    - `slopes`: scheme -> [samples], derivative of each sample's mean loss along the error that the scheme makes in the unit.
    - `sample_tokens`: tokens that a sample's mean loss is over.
    - `cosine`: mean per-token cosine of the input and output of the unit's block (LIM).
    - `loss_change`: scheme -> change of the model's loss in nats per token when only this unit is quantized so,
      measured or predicted.
    - `seed`: for scores that draw lots.
    """

    name: str
    index: int
    count: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Stats] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    slopes: Mapping[Scheme | None, Tensor] = field(default_factory=dict)
    sample_tokens: int = 0
    cosine: float | None = None
    loss_change: Mapping[Scheme | None, float] = field(default_factory=dict)
    seed: int = 0


def error_of(weight: Tensor, scheme: Scheme | None) -> Tensor:
    """What round-to-nearest under `scheme` adds to `weight` [out, in], fp32."""
    weight = weight.float()
    return (
        weight.new_zeros(weight.shape) if scheme is None else decode(quantize_tensor(weight, scheme)) - weight
    )
