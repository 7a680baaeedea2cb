"""ZD, z-score distribution: the share of a layer's weights that lie above its mean by more than one standard deviation.

    z_i = (w_i - mean) / std over the layer's weights ;    ZD(l) = #{ i : z_i > 1 } / N ;    smaller = more important

Dumitru et al. 2024, arXiv:2406.17415, section 3.1; data-free. The share falls as tails grow heavier (Gaussian 0.1587,
Laplace 0.1215, Student's t3 0.091): a small ZD means heavy tails, it is a kurtosis in disguise. Whether the paper counts
|z| > 1 and whether it pools the matrices of a block is not settled, so both are offered: `zd` pools all weights of the unit
and counts one side; `zd-two-sided` both sides; `zd-per-matrix` and `zd-two-sided-per-matrix` average the matrices' own shares.
The score returned is -ZD, so that larger is more important as for every other score.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.importance.methods import DATA_FREE, ScoreMethod
from fracbit.importance.view import LayerView


def share_above(weights: Sequence[Tensor], two_sided: bool = False) -> float:
    """Share of all the numbers in `weights` whose z-score is above 1 (two-sided: above 1 or below -1), in 0..1.

    Raises `WeightError` for NaN or Inf, and for numbers that are all the same (no standard deviation).
    """
    count = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.double().sum()) for weight in weights) / count
    variance = sum(float((weight.double() - mean).square().sum()) for weight in weights) / count
    if not variance > 0 or variance == float("inf"):
        raise WeightError(f"{count} weights have no z-scores: their variance is {variance}")
    above = 0
    for weight in weights:
        distance = weight.double() - mean
        above += int(torch.count_nonzero((distance.abs() if two_sided else distance) > variance**0.5))
    return above / count


def z_score_distribution(two_sided: bool, per_matrix: bool) -> Callable[[LayerView], float]:
    """The score -ZD of a unit: pooled over its matrices, or the mean of their own."""

    def score(view: LayerView) -> float:
        matrices = list(view.weights.values())
        if not per_matrix:
            return -share_above(matrices, two_sided)
        return -sum(share_above([matrix], two_sided) for matrix in matrices) / len(matrices)

    return score


def _line(about: str, two_sided: bool, per_matrix: bool) -> ScoreMethod:
    score = z_score_distribution(two_sided, per_matrix)
    return ScoreMethod(f"share of weights more than 1 std {about}", score, None, DATA_FREE)


POOLED = _line("above the mean, pooled", False, False)
TWO_SIDED = _line("from the mean, pooled", True, False)
PER_MATRIX = _line("above the mean, mean over matrices", False, True)
TWO_SIDED_PER_MATRIX = _line("from the mean, mean over matrices", True, True)
