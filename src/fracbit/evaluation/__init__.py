"""Evaluating models: perplexity on text, divergence from the float model, and zero-shot accuracy."""

from fracbit.evaluation.divergence import Divergence
from fracbit.evaluation.float_logits import FloatLogits, keep_logits, open_logits
from fracbit.evaluation.float_reference import Expected, Reference, keep_expected
from fracbit.evaluation.judge import Judgement, judge, perplexity
from fracbit.evaluation.local_tasks import (
    LocalTask,
    TaskItem,
    continuation_items,
    write_continuation,
    write_lambada,
)
from fracbit.evaluation.logits import longest_window
from fracbit.evaluation.loss import Perplexity, default_window
from fracbit.evaluation.windows import Ids, Protocol, Window, Windowing, cut_windows
from fracbit.evaluation.zero_shot import (
    PAPER_TASKS,
    Questions,
    TaskScore,
    ZeroShot,
    ask,
    prepare_questions,
    tasks_of,
    zero_shot,
)

__all__ = [
    "PAPER_TASKS",
    "Divergence",
    "Expected",
    "FloatLogits",
    "Ids",
    "Judgement",
    "LocalTask",
    "Perplexity",
    "Protocol",
    "Questions",
    "Reference",
    "TaskItem",
    "TaskScore",
    "Window",
    "Windowing",
    "ZeroShot",
    "ask",
    "continuation_items",
    "cut_windows",
    "default_window",
    "judge",
    "keep_expected",
    "keep_logits",
    "longest_window",
    "open_logits",
    "perplexity",
    "prepare_questions",
    "tasks_of",
    "write_continuation",
    "write_lambada",
    "zero_shot",
]
