"""What a model is worth: perplexity over text, and divergence from the float model it was made from."""

from fracbit.evaluation.divergence import Divergence, compare, divergence
from fracbit.evaluation.float_logits import FloatLogits, keep_logits, open_logits
from fracbit.evaluation.local_tasks import (
    LocalTask,
    TaskItem,
    continuation_items,
    write_continuation,
    write_lambada,
)
from fracbit.evaluation.logits import Progress, longest_window
from fracbit.evaluation.perplexity import Perplexity, default_window, perplexity
from fracbit.evaluation.windows import Ids, Protocol, Window, Windowing, plan_windows
from fracbit.evaluation.zero_shot import (
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
    "LocalTask",
    "Perplexity",
    "Progress",
    "Protocol",
    "Questions",
    "TaskItem",
    "TaskScore",
    "Window",
    "Windowing",
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
