"""The relative squared error that a scheme leaves in a unit's weights: data-free; unlike LIM and ZD it knows the bits."""

from fracbit.importance.methods import DATA_FREE, ScoreMethod
from fracbit.importance.view import LayerView, error_of
from fracbit.records.scheme import Scheme


def weight_error(view: LayerView, scheme: Scheme | None) -> float:
    """The sum of (q - w)^2 over that of w^2, over all weights of the unit; 0 for a unit of zeros."""
    lost = power = 0.0
    for weight in view.weights.values():
        lost += float(error_of(weight, scheme).double().square().sum())
        power += float(weight.double().square().sum())
    return lost / power if power > 0 else 0.0


WEIGHT_ERROR = ScoreMethod("relative squared error of the weights", None, weight_error, DATA_FREE)
