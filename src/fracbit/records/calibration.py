"""What a recipe says of calibration: which texts, how many samples, and how the blocks are walked with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from fracbit.records.checked import Checked
from fracbit.records.named import read_named
from fracbit.records.tables import CORRECTIONS, TRANSFORMS
from fracbit.records.text_source import GIVE


def _known_tweak(name: str) -> str:
    return name if name == "none" else str(read_named(name, CORRECTIONS))


Tweak = Annotated[str, AfterValidator(_known_tweak)]
TransformName = Annotated[str, AfterValidator(TRANSFORMS.check)]
AxisChoice = Literal["scheme", "nearest", "gptq", "predicted"]


class Calibration(Checked):
    """Calibration data and how it is used.

    - `texts`: sources as `fracbit evaluate` takes them, `generated` for text that the model writes itself.
    - `builtin`: share of the samples that are drawn from the text that comes with fracbit, which has conversations, code and
      many languages, so that what the `texts` are not like loses less (docs/calibrated.md).
    - `samples`: pieces of text that are read; `length`: ids of each sample, by default at most the model's positions.
    - `batch`: samples that pass a block together; a correction with `tokens` of its own, such as `train`, takes those.
    - `chain`: a block sees the outputs of the quantized blocks before it, or of the float ones.
    - `sequential`: inside a block, linears are observed after those before them are quantized.
    - `transforms`: equal-function rewrites before a block is quantized, rotations first, then factors in the order given:
      `smooth`, `awq`, `rotate` (the residual stream, folded), `rotate-mlp` (a Hadamard matrix at run time).
    - `inputs`: how activations are rounded at run time: None, or `int8`, `int8/tensor`, `power8/token`.
    - `weigh`: how tokens count in the statistics that quantizers read: `equal`, or by what the end `loss` makes of them, the
      size of its gradient at the output of the linear; that takes a backward pass over the float model.
    - `axis`: the scheme's own, or per layer the better of both by trial (`nearest`, `gptq`) or from the scales (`predicted`).
    - `tweak`: correction after each block: `none`; norm tweaking by `adam` as the paper, in `closed` form, or (`auto`) by
      whichever of both helps held-out samples; or `train`, which trains everything that the block stores, codes included.
      Options follow a colon: `train:epochs=8`.
    - `distill`: epochs of training everything stored, codes included, on the float model's own predictions;
      `rate`: learning rate of Adam in them.
    - `dtype`: of the forward passes; `auto` is bfloat16 where the machine multiplies it natively and the model is stored in it.
    """

    called: ClassVar[str] = "a calibration"
    remedies: ClassVar[Mapping[str, str]] = {
        "texts": f'{GIVE}; in a recipe, texts = ["FILE"] below [calibration]'
    }

    texts: tuple[str, ...]
    builtin: float = Field(default=0.0, ge=0, lt=1)
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    batch: int = Field(default=8, ge=1)
    chain: Literal["quantized", "float"] = "quantized"
    sequential: bool = False
    transforms: tuple[TransformName, ...] = ()
    inputs: str | None = None
    weigh: Literal["equal", "loss"] = "equal"
    axis: AxisChoice = "scheme"
    tweak: Tweak = "none"
    distill: int = Field(default=0, ge=0)
    rate: float = Field(default=5e-3, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
