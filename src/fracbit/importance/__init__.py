"""What a layer is worth and who gets which bits. Tensors and numbers only; passes through a model live in the pipeline."""

from fracbit.importance.allocate import Solution, best_uniform, by_order, exact, predict_losses
from fracbit.importance.gram_error import guided_error
from fracbit.importance.lim import cosine_sum
from fracbit.importance.limits import Budget, average_bits, device_memory, file_size
from fracbit.importance.methods import IN_TURN, SCORES, ScoreMethod, reverse, score_method
from fracbit.importance.units import LayerShape, Unit, cost_table, make_units, scheme_bits
from fracbit.importance.view import LayerView, error_of

__all__ = [
    "IN_TURN", "SCORES", "Budget", "LayerShape", "LayerView", "ScoreMethod", "Solution", "Unit", "average_bits",
    "best_uniform", "by_order", "cosine_sum", "cost_table", "device_memory", "error_of", "exact", "file_size", "guided_error",
    "make_units", "predict_losses", "reverse", "scheme_bits", "score_method",
]  # fmt: skip
