"""The table of layer scores. To add one, write its file and a line in `SCORES`.

Every score is larger for a more important unit. `reverse:NAME` is any of them turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fracbit.errors import RecipeError, near_matches
from fracbit.importance.chance import chance
from fracbit.importance.gradient_error import fisher_error, gradient_error
from fracbit.importance.gram_error import gram_error
from fracbit.importance.layer import LayerView
from fracbit.importance.lim import layer_input_modification
from fracbit.importance.oracle import loss_change
from fracbit.importance.sequence import first, last
from fracbit.importance.weight_error import weight_error
from fracbit.importance.zd import z_score_distribution
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores

Need: TypeAlias = Literal[
    "weights", "cosine", "cosine behind the final norm", "gram", "gradients", "slopes", "loss"
]
DATA_FREE: frozenset[Need] = frozenset({"weights"})


@dataclass(frozen=True)
class ScoreMethod:
    """One line of the table: `plain` scores a unit by itself, `of_scheme` under a scheme; exactly one is
    given. `needs` is what the pipeline must put into the views. A score of weights alone is an average over them, not a sum:
    of large weights it sees a sample of rows.
    """

    about: str
    plain: Callable[[LayerView], float] | None = None
    of_scheme: Callable[[LayerView, Scheme | None], float] | None = None
    needs: frozenset[Need] = frozenset()

    @property
    def data_free(self) -> bool:
        """Whether the score reads no text."""
        return self.needs <= DATA_FREE


def _zd(about: str, two_sided: bool, per_matrix: bool) -> ScoreMethod:
    score = z_score_distribution(two_sided, per_matrix)
    return ScoreMethod(f"share of weights more than 1 std {about}", score, None, DATA_FREE)


SCORES: dict[str, ScoreMethod] = {
    "lim": ScoreMethod(
        "negative cosine of block input and output", layer_input_modification, needs=frozenset({"cosine"})
    ),
    "lim-final-norm": ScoreMethod(
        "lim, the last block read behind the final norm",
        layer_input_modification,
        needs=frozenset({"cosine behind the final norm"}),
    ),
    "zd": _zd("above the mean, pooled", False, False),
    "zd-two-sided": _zd("from the mean, pooled", True, False),
    "zd-per-matrix": _zd("above the mean, mean over matrices", False, True),
    "zd-two-sided-per-matrix": _zd("from the mean, mean over matrices", True, True),
    "random": ScoreMethod("drawn from the seed", chance),
    "first": ScoreMethod("earlier is more important", first),
    "last": ScoreMethod("later is more important", last),
    "weight-error": ScoreMethod("relative squared error of the weights", None, weight_error, DATA_FREE),
    "gram-error": ScoreMethod(
        "relative squared error of the outputs", None, gram_error, frozenset({"weights", "gram"})
    ),
    "gradient": ScoreMethod(
        "sum of |gradient x error|", None, gradient_error, frozenset({"weights", "gradients"})
    ),
    "fisher": ScoreMethod("second-order loss along the error", None, fisher_error, frozenset({"slopes"})),
    "oracle": ScoreMethod("loss with only this unit quantized", None, loss_change, frozenset({"loss"})),
}


def score_method(name: str) -> ScoreMethod:
    """The score called `name`, `reverse:` taken off. Raises `RecipeError` with near matches."""
    plain = name.removeprefix("reverse:")
    if plain not in SCORES:
        raise RecipeError(f"unknown score {plain!r}; {near_matches(plain, SCORES)}")
    return SCORES[plain]


def reverse(scores: Scores) -> Scores:
    """The same scores with the least important layer first: the control that a good order must beat."""
    values: Mapping[str, float] = {name: -value for name, value in scores.values.items()}
    return Scores(values, f"reverse:{scores.method}", scores.model, "order", scores.protocol)
