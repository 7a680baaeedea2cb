"""What a model is worth: perplexity over text, and divergence from the float model it was made from."""

from fracbit.evaluate.divergence import Divergence, compare, divergence
from fracbit.evaluate.local_tasks import (
    Item,
    LocalTask,
    continuation_items,
    write_continuation,
    write_lambada,
)
from fracbit.evaluate.logits import Progress, longest_window
from fracbit.evaluate.perplexity import Perplexity, default_window, perplexity
from fracbit.evaluate.reference import FloatLogits, keep_logits, open_logits
from fracbit.evaluate.windows import Ids, Plan, Protocol, Window, plan_windows
from fracbit.evaluate.zero_shot import (
    PAPER_TASKS,
    Questions,
    TaskScore,
    ZeroShot,
    ask,
    prepare,
    tasks_of,
    zero_shot,
)

__all__ = [
    "PAPER_TASKS",
    "Divergence",
    "FloatLogits",
    "Ids",
    "Item",
    "LocalTask",
    "Perplexity",
    "Plan",
    "Progress",
    "Protocol",
    "Questions",
    "TaskScore",
    "Window",
    "ZeroShot",
    "ask",
    "compare",
    "continuation_items",
    "default_window",
    "divergence",
    "keep_logits",
    "longest_window",
    "open_logits",
    "perplexity",
    "plan_windows",
    "prepare",
    "tasks_of",
    "write_continuation",
    "write_lambada",
    "zero_shot",
]
