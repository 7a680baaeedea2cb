"""`Inputs`: how the activations that enter a quantized linear are rounded while the model runs. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fracbit.errors import SchemeError

_LABEL = re.compile(r"([a-z]+)([2-8])(?:/(token|tensor|[1-9]\d*))?")


@dataclass(frozen=True)
class Inputs:
    """Rounding of activations: a symmetric data type, and how many of them share a scale.

    - `dtype`, `bits`: as in a `Scheme`; fixed types only (`int`, `power`, `power:1/2`, `float`, `nf`).
    - `scope`: `token`, a scale per token, found while running; a number such as `128`, one for so many inputs of a token, found
      while running; `tensor`, one `scale` for all, from calibration.
    - `scale`: the largest magnitude that is represented, for `tensor` after calibration.
    """

    dtype: str = "int"
    bits: int = 8
    scope: str = "token"
    scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot exist. Raises `SchemeError`."""
        if self.scope not in ("token", "tensor") and not self.group:
            raise SchemeError(
                f"scope {self.scope!r} of activations is not known; use token, tensor, or a number of inputs such as 128"
            )
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"activations have 2 to 8 bits, got {self.bits}")

    @property
    def group(self) -> int:
        """How many inputs of a token share a scale; 0 where all do."""
        return int(self.scope) if self.scope.isdecimal() else 0

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
    """Read `int8`, `int8/tensor`, `power8/token` or `ocp8/128`. Raises `SchemeError`."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise SchemeError(
            f"{text!r} is not a rounding of activations: write TYPEBITS or TYPEBITS/SCOPE, such as int8/token"
        )
    dtype, bits, scope = match.groups()
    return Inputs(dtype, int(bits), scope or "token")
