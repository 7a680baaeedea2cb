"""The squared error at the outputs of a unit's linears: the weight error seen through the inputs' Gram matrix.

    sum over linears of tr(E G E^T) / tr(W G W^T),     G = sum x x^T over calibration tokens, E = what quantizing adds to W

GPTQ's objective (arXiv:2210.17323), relative to the output's own energy so that linears of different scale can be added.
"""

from torch import Tensor

from fracbit.errors import DataError
from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView, error_of
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


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W G W^T): squared outputs of `weight` [out, in] summed over the tokens that `gram` [in, in] saw."""
    weight = weight.double()
    projected = weight @ gram.double()  # [out, in]
    return float((projected * weight).sum())


GRAM_ERROR = ScoreMethod(
    "relative squared error of the outputs", None, gram_error, frozenset({"weights", "gram"})
)
