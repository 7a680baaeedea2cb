"""`Outliers`: how many input columns of every linear stay in 16 bits, and by which rule they are chosen. Torch-free.

Text form: `cost:0.01`, `proxy:2%`, `random:0.02`, `activation:0.01`, `none`. Proxy columns: arXiv:2212.09720, Sec. 3.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from fracbit.errors import RecipeError
from fracbit.records.checked import Checked
from fracbit.records.tables import COLUMN_RULES

_TEXT = re.compile(r"([a-z_-]+):(0?\.\d+|\d+(?:\.\d+)?%?)")


class Outliers(Checked):
    """A `share` of the input columns of every linear in the blocks, above 0 and below 1, kept in 16 bits.

    `chosen`: the rule of `COLUMN_RULES`: `cost`, what rounding them would cost; `activation`, their energy on calibration
    text; `proxy`, the weight std of the units that produce them; `random`, the control.
    """

    called: ClassVar[str] = "a choice of outliers"

    chosen: Annotated[str, AfterValidator(COLUMN_RULES.check)]
    share: float = Field(gt=0, lt=1)

    def __str__(self) -> str:
        return f"{self.chosen}:{self.share:g}"


def read_outliers(text: str) -> Outliers | None:
    """Read `none`, `cost:0.01`, `proxy:2%`. Raises `RecipeError` for anything else, with near matches of the rule."""
    if text == "none":
        return None
    match = _TEXT.fullmatch(text)
    share = 0.0
    if match:
        COLUMN_RULES.check(match[1])
        share = float(match[2].removesuffix("%")) / (100 if match[2].endswith("%") else 1)
    if match is None or not 0 < share < 1:
        raise RecipeError(
            f"outliers {text!r}: write none, or RULE:SHARE with a share below 1, such as cost:0.01 or proxy:2%; "
            f"rules are {', '.join(COLUMN_RULES)}"
        )
    return Outliers(chosen=match[1], share=share)


def _outliers(value: object) -> object:
    return read_outliers(value) if isinstance(value, str) else value


OutliersField = Annotated[Outliers | None, BeforeValidator(_outliers)]
