"""What a score is, and the scores by name. To add one, write its file and a line in records/tables.py.

Every score is larger for a more important unit. `reverse:NAME` is any of them turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fracbit.importance.view import LayerView
from fracbit.records import tables
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores
from fracbit.records.tables import Table

Need: TypeAlias = Literal[
    "weights",
    "cosine",
    "cosine behind the final norm",
    "gram",
    "guided errors",
    "gradients",
    "slopes",
    "loss",
]
DATA_FREE: frozenset[Need] = frozenset({"weights"})
IN_TURN: frozenset[Need] = frozenset({"guided errors"})
"""What is measured block by block, without the whole model in memory."""


@dataclass(frozen=True)
class ScoreMethod:
    """One line of the table: `plain` scores a unit by itself, `of_scheme` under a scheme; exactly one is given.

    `needs` is what the pipeline must put into the views. A score of weights alone is an average over them, not a sum: of large
    weights it sees a sample of rows.
    """

    about: str
    plain: Callable[[LayerView], float] | None = None
    of_scheme: Callable[[LayerView, Scheme | None], float] | None = None
    needs: frozenset[Need] = frozenset()

    @property
    def data_free(self) -> bool:
        """Whether the score reads no text."""
        return self.needs <= DATA_FREE


SCORES: Table[ScoreMethod] = tables.SCORES


def score_method(name: str) -> ScoreMethod:
    """The score called `name`, `reverse:` taken off. Raises `RecipeError` with near matches."""
    return SCORES[name.removeprefix("reverse:")]


def reverse(scores: Scores) -> Scores:
    """The same scores with the least important layer first: the control that a good order must beat."""
    values: Mapping[str, float] = {name: -value for name, value in scores.values.items()}
    return Scores(
        values, f"reverse:{scores.method}", model=scores.model, kind="order", protocol=scores.protocol
    )
