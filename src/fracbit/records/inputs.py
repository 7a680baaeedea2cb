"""`Inputs`: how the activations that enter a quantized linear are rounded while the model runs. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fracbit.errors import SchemeError, check_choice

Scope = Literal["token", "tensor"]
_LABEL = re.compile(r"([a-z]+)([2-8])(?:/(token|tensor))?")


@dataclass(frozen=True)
class Inputs:
    """Rounding of activations: a symmetric data type, and whether every token has its own scale or all share one.

    - `dtype`, `bits`: as in a `Scheme`; fixed types only (`int`, `power`, `power:1/2`, `float`, `nf`).
    - `scope`: `token`, a scale per token, found while running; `tensor`, one `scale` for all, from calibration.
    - `scale`: the largest magnitude that is represented, for `tensor` after calibration.
    """

    dtype: str = "int"
    bits: int = 8
    scope: Scope = "token"
    scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot exist. Raises `SchemeError`."""
        check_choice("scope of activations", self.scope, get_args(Scope), SchemeError)
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"activations have 2 to 8 bits, got {self.bits}")

    def __str__(self) -> str:
        """A label such as `int8/token`; `parse_inputs` reads it back."""
        return f"{self.dtype}{self.bits}/{self.scope}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Inputs:
        """Read what `to_json` wrote."""
        return Inputs(**data)


def parse_inputs(text: str) -> Inputs:
    """Read `int8`, `int8/tensor` or `power8/token`. Raises `SchemeError`."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise SchemeError(
            f"{text!r} is not a rounding of activations: write TYPEBITS or TYPEBITS/SCOPE, such as int8/token"
        )
    dtype, bits, scope = match.groups()
    return Inputs(dtype, int(bits), "tensor" if scope == "tensor" else "token")
