"""Gemma 1, 2 and 3: Llama's block with gains stored as `gain - 1`; from Gemma 2 on each half is normed again
on its way out.

Gemma 2 and 3 alternate sliding and full attention, so every block has its own mask (and, in Gemma 3, its own
rotation).
"""

from dataclasses import replace

from fracbit.models.families.llama import ATTENTION, HEAD_NORMS, LLAMA, MLP
from fracbit.models.family import Norm

GEMMA = replace(LLAMA, name="gemma", model_types=("gemma",), gain_offset=1.0)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    norms=(
        Norm("input_layernorm", ATTENTION),
        Norm("post_attention_layernorm", exclusive=False),
        Norm("pre_feedforward_layernorm", MLP),
        Norm("post_feedforward_layernorm", exclusive=False),
        *HEAD_NORMS,
    ),
)
