"""The squared error at the outputs of a unit's linears: the weight error seen through the inputs' Gram matrix.

`gram-error`: GPTQ's objective (arXiv:2210.17323), relative to the output's own energy so that linears of different scale can be
added; G = sum x x^T over calibration tokens, E = what quantizing adds to W.

    sum over linears of tr(E G E^T) / tr(W G W^T)

`guided-error`: in nats per token, the loss's second-order term with a Fisher matrix that is diagonal at the outputs of a linear
(GuidedQuant, arXiv:2505.07004, eq. 4); G = mean g_t x_t x_t^T, g_t the mean squared gradient of the summed loss at the outputs.

    sum over linears of tr(E G E^T) / 2
"""

import torch
from torch import Tensor

from fracbit.errors import DataError
from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView, error_of
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme


def gram_error(view: LayerView, scheme: Scheme | None) -> float:
    """Mean over the unit's linears, weighted by their size, of the relative squared output error."""
    total = weights = 0.0
    for name, weight in view.weights.items():
        gram = view.stats[name].gram
        if gram is None or view.stats[name].tokens == 0:
            raise DataError(
                f"the Gram-weighted error of {name} needs inputs; it saw {view.stats[name].tokens} tokens"
            )
        power = output_energy(weight, gram)
        relative = output_energy(error_of(weight, scheme), gram) / power if power > 0 else 0.0
        total += relative * weight.numel()
        weights += weight.numel()
    return total / weights


def guided_error(weight: Tensor, stats: Stats, scheme: Scheme | None) -> float:
    """The loss that the error of one linear adds, in nats; tokens of `stats` are weighed. `weight` [out, in]."""
    assert stats.gram is not None
    return float(gram_errors(error_of(weight, scheme), stats.gram).sum(dtype=torch.float64)) / 2


def added_loss(view: LayerView, scheme: Scheme | None) -> float:
    """The loss that the errors of the unit's linears add, in nats per token."""
    return view.loss_change[scheme]


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W G W^T): squared outputs of `weight` [out, in] summed over the tokens that `gram` [in, in] saw."""
    weight = weight.double()
    projected = weight @ gram.double()  # [out, in]
    return float((projected * weight).sum())


GRAM_ERROR = ScoreMethod(
    "relative squared error of the outputs", None, gram_error, frozenset({"weights", "gram"})
)
GUIDED_ERROR = ScoreMethod(
    "loss that the errors of the outputs add", None, added_loss, frozenset({"guided errors"})
)
