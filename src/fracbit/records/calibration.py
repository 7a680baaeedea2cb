"""What a recipe says of calibration: which texts, how many samples, and how the blocks are walked with them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Tweak = Literal["none", "auto", "adam", "closed"]
Transform = Literal["smooth", "awq", "rotate", "rotate-mlp"]
AxisChoice = Literal["scheme", "nearest", "gptq", "predicted"]


class Calibration(BaseModel):
    """Calibration data and how it is used.

    - `texts`: sources as `fracbit evaluate` takes them, `generated` for text that the model writes itself.
    - `samples` of `length` ids each, `batch` of them through a block at a time.
    - `chain`: a block sees what the quantized blocks before it give, or what the float ones would.
    - `sequential`: inside a block, linears are observed after those before them are quantized.
    - `transforms`: equal-function rewrites before a block is quantized, rotations first, then factors in the order given:
      `smooth`, `awq`, `rotate` (the residual stream, folded), `rotate-mlp` (a Hadamard matrix at run time).
    - `inputs`: how activations are rounded at run time: None, or `int8`, `int8/tensor`, `power8/token`.
    - `axis`: the scheme's own, or per layer the better of both by trial (`nearest`, `gptq`) or from the scales (`predicted`).
    - `outliers`: share of the input columns of every linear kept in 16 bits, those whose rounding would cost most.
    - `tweak`: norm tweaking after each block: Adam as the paper, closed form, or (`auto`) whichever helps held-out samples.
    - `distill`: epochs of training everything stored, codes included, on the float model's own predictions; `rate` is Adam's.
    - `dtype`: of the forward passes; `auto` is bfloat16 where the machine multiplies it natively and the model is stored in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[str, ...]
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    batch: int = Field(default=8, ge=1)
    chain: Literal["quantized", "float"] = "quantized"
    sequential: bool = False
    transforms: tuple[Transform, ...] = ()
    inputs: str | None = None
    axis: AxisChoice = "scheme"
    outliers: float = Field(default=0, ge=0, lt=1)
    tweak: Tweak = "none"
    distill: int = Field(default=0, ge=0)
    rate: float = Field(default=5e-3, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
