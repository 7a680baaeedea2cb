"""What a model is worth: perplexity over text, and divergence from the float model it was made from."""

from fracbit.evaluate.divergence import Divergence, compare, divergence
from fracbit.evaluate.logits import Progress, longest_window
from fracbit.evaluate.perplexity import Perplexity, default_window, perplexity
from fracbit.evaluate.reference import FloatLogits, keep_logits, open_logits
from fracbit.evaluate.speed import Speed, generation_speed
from fracbit.evaluate.windows import Ids, Plan, Protocol, Window, plan_windows

__all__ = [
    "Divergence",
    "FloatLogits",
    "Ids",
    "Perplexity",
    "Plan",
    "Progress",
    "Protocol",
    "Speed",
    "Window",
    "compare",
    "default_window",
    "divergence",
    "generation_speed",
    "keep_logits",
    "longest_window",
    "open_logits",
    "perplexity",
    "plan_windows",
]
