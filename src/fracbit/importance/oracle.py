"""The oracle: quantize one unit, leave all others float, and measure. What every cheaper score tries to predict.

One evaluation for each unit and scheme. It still knows nothing of how units act together: see the additivity check of the
lens, and CoopQ (arXiv:2509.15455) on what that costs below 4 bits.
"""

from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView
from fracbit.records.scheme import Scheme


def loss_change(view: LayerView, scheme: Scheme | None) -> float:
    """Change of the model's loss in nats per token with only this unit quantized; may be below 0."""
    return view.loss_change[scheme]


ORACLE = ScoreMethod("loss with only this unit quantized", None, loss_change, frozenset({"loss"}))
