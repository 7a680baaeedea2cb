"""Presets: settings by how long a run may take, as a recipe and a budget.

- `fast`: rounding to nearest. Needs no data; seconds.
- `good`: GPTQ on the outputs of the quantized blocks, with searched ranges; from 3 bits on, tokens weighed by the end loss.
  Minutes.
- `best`: GPTQ, then training block by block on the float model's states. Models of at most `SMALL` weights are distilled as a
  whole instead, after GPTQ with coordinate descent on learned tables (kmeans) with 8-bit scales.

For models of more weights, both draw an eighth of their samples from the built-in text: what a text for calibration is not
like, such as conversations, then loses much less (docs/LOG.md). `calibration.builtin=0` leaves it out.

All others store integers in blocks of 24 to 128 weights with a scale and an offset of 3 or 4 bits each: at equal stored bits
they lose a quarter less than blocks of 64 with a 16-bit scale and a zero point (docs/LOG.md). For an engine they keep to the
latter, of which the engine's own grid is then taken (target.py).

With a budget, the exact solver chooses bits and block of every linear within it, by the loss that its errors add (score
`guided-error`, one backward pass over the float model, block by block). `fast` and models that are distilled go by the error of
the weights. docs/quality.md has figures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending

BLOCKS = {"fine": (24, 32, 48, 64, 128), "table": (32, 48, 64, 128)}
UNIFORM = 4  # bits without a budget
UNIFORM_BLOCK = {"fine": 32, "table": 64, "engine": 64}
SMALL = 20_000_000  # weights; distillation holds 24 bytes for each, and takes hours on a CPU above
WEIGHED = 3  # bits from which tokens are weighed by the loss; at 2 bits nothing was gained on SmolLM2-135M
BESIDE = 0.125  # of the samples: built-in text. Small models know little of what it has
SCORED = 16  # samples that predict what each linear loses
EPOCHS = 8  # of distillation
RATE = 5e-3  # of distillation at 2 bits


def preset(
    recipe: Recipe, spending: Spending, weights: int, *, average: float | None = None
) -> tuple[Recipe, Spending]:
    """The recipe with the preset's settings, and the budget with its levels; what the recipe says itself wins.

    The recipe has calibration texts where the preset reads some (`check_terms`).
    `weights`: how many weights the model's linears have; `average`: about how many bits each has under a size or a memory.
    Without a budget, the recipe has a scheme, its own or the preset's.
    """
    name = spending.preset
    average = average if spending.average_bits is None else spending.average_bits
    distilled = name == "best" and weights <= SMALL
    kind = "engine" if spending.engine is not None else "table" if distilled else "fine"
    own = recipe.scheme.bits if "scheme" in recipe.model_fields_set else UNIFORM
    settings, calibration = _settings(str(name), own if average is None else average, weights)
    settings = {field: value for field, value in settings.items() if field not in recipe.model_fields_set}
    if recipe.calibration is not None:
        given = recipe.calibration.model_dump(exclude_unset=True)
        settings["calibration"] = Calibration(**(calibration | given))
    if average is not None:
        guided = name != "fast" and not distilled
        score: dict[str, Any] = {"score": "guided-error", "samples": SCORED} if guided else {}
        some = None if kind == "engine" else levels(kind, average)  # an engine's own are found in target.py
        return recipe.model_copy(update=settings), replace(spending, preset=None, levels=some, **score)
    if "scheme" not in recipe.model_fields_set:
        settings["scheme"] = _scheme(kind, UNIFORM, UNIFORM_BLOCK[kind])
    return recipe.model_copy(update=settings), Spending(engine=spending.engine)


def _settings(name: str, bits: float, weights: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the recipe, and of its calibration."""
    if name == "fast":
        return {"quantizer": "rtn", "search": False}, {}
    if name == "good" or weights > SMALL:
        calibration: dict[str, Any] = {"builtin": BESIDE} if weights > SMALL else {}
        if name == "best":
            calibration["tweak"] = "train"
        elif bits >= WEIGHED:
            calibration["weigh"] = "loss"
        return {"quantizer": "gptq", "search": True}, calibration
    # Latent weights are in units of the block scale, and the values of a table are closer with every bit.
    rate = RATE * 2.0 ** (2 - int(bits))
    return {"quantizer": "descent", "search": True}, {"distill": EPOCHS, "rate": rate, "dtype": "float32"}


def levels(kind: str, average_bits: float) -> tuple[Scheme, ...]:
    """Schemes of a `kind` of grid around a budget: its whole bits, one bit less and one bit more, at every block size."""
    width = min(max(int(average_bits), 1), 8)
    widths = [k for k in (width - 1, width, width + 1) if 1 <= k <= 8]
    return tuple(_scheme(kind, k, block) for k in widths for block in BLOCKS[kind])


def _scheme(kind: str, bits: int, block: int) -> Scheme:
    if kind == "engine":
        return Scheme("int", bits, block, offset="zero")
    if kind == "table":
        return Scheme("kmeans", bits, block, scale="int8:256")
    return Scheme("int", bits, block, offset="float", scale=f"int{3 if bits <= 2 else 4}:256")
