"""What a model is worth: perplexity over text, and divergence from the float model it was made from."""

from fracbit.evaluate.logits import Progress, longest_window
from fracbit.evaluate.perplexity import Perplexity, default_window, perplexity
from fracbit.evaluate.windows import Ids, Plan, Protocol, Window, plan_windows

__all__ = [
    "Ids",
    "Perplexity",
    "Plan",
    "Progress",
    "Protocol",
    "Window",
    "default_window",
    "longest_window",
    "perplexity",
    "plan_windows",
]
