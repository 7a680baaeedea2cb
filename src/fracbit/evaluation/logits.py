"""From windows to rows of logits, in bounded memory.

The logits of a large vocabulary are the largest tensor of an evaluation: 2048 ids x 152 000 tokens are 1.2 GB
in fp32. So they are never all held in fp32. Windows run in batches with logits under `LOGIT_BYTES`, and steps
that need fp32 (log-softmax, divergence) get `ROW_VALUES` values at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import DataError
from fracbit.evaluation.windows import Window, Windowing
from fracbit.models.attention import native_attention

LOGIT_BYTES = 1 << 30

ROW_VALUES = 1 << 20
"""4 MiB of fp32. Measured at 152 000 tokens: 4 times as fast as 64 MiB, which does not fit the cache."""


@dataclass(frozen=True)
class ScoredRows:
    """The predictions for one window. logits: [scored, vocabulary], the model's dtype; targets: int64
    [scored].
    """

    index: int
    window: Window
    logits: Tensor
    targets: Tensor


def longest_window(model: PreTrainedModel) -> int | None:
    """How many ids the model's positions reach; None when the config states no limit (ALiBi, state space)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many ids the model knows, as its config states it."""
    return int(model.config.get_text_config().vocab_size)


def check_fits(model: PreTrainedModel, windows: Windowing) -> None:
    """Refuse windows longer than the model's positions and ids outside its vocabulary.

    Raises: DataError.
    """
    limit = longest_window(model)
    if limit is not None and windows.protocol.window > limit:
        raise DataError(
            f"window {windows.protocol.window} is longer than the {limit} positions of the model "
            f"(max_position_embeddings): use a window of 2..{limit}."
        )
    rows = vocabulary_of(model)
    for number, document in enumerate(windows.documents):
        outside = (document < 0) | (document >= rows)  # [ids]
        if bool(outside.any()):
            position = int(outside.nonzero()[0])
            raise DataError(
                f"id {int(document[position])} at position {position} of document {number} is outside the "
                f"model's vocabulary 0..{rows - 1}: the text was tokenized for another model."
            )


def scored_rows(model: PreTrainedModel, windows: Windowing, *, batch: int = 8) -> Iterator[ScoredRows]:
    """Run the model over all windows, longest first, and yield the logits of each window's scored ids.

    batch: windows run together; fewer if their logits would exceed LOGIT_BYTES. Logits may be NaN: the caller
    must check them.

    Raises: DataError when the windows do not fit the model.
    """
    if batch < 1:
        raise DataError(f"batch {batch} runs no window: it must be at least 1.")
    check_fits(model, windows)
    order = run_order(windows)
    batch = min(batch, _batch_limit(model, windows.protocol.window))
    for start in range(0, len(order), batch):
        yield from _run(model, windows, order[start : start + batch])


def run_order(windows: Windowing) -> list[int]:
    """Indices of the windows, longest first: windows of similar length share a batch, with little padding."""
    return sorted(
        range(len(windows.all)), key=lambda index: windows.all[index].begin - windows.all[index].end
    )


def predict(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of ids [batch, length], without gradients or dropout.

    The model's training flag is restored afterwards.
    """
    training = model.training
    # Set for this call only: between windows, the model must be in the caller's mode.
    if training:
        model.train(False)
    try:
        with torch.no_grad(), native_attention(model):
            logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
            return logits  # [batch, length, vocabulary]
    finally:
        if training:
            model.train(True)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices over `rows` such that a chunk has about ROW_VALUES logits."""
    step = max(1, ROW_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, rows, step))


def _run(model: PreTrainedModel, windows: Windowing, indices: Sequence[int]) -> Iterator[ScoredRows]:
    together = [windows.all[index] for index in indices]
    inputs = [windows.inputs(window) for window in together]  # [length of the window] each
    # Padding on the right: a causal model's predictions for the ids before it do not see it.
    padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # [batch, length]
    logits = predict(model, padded)  # [batch, length, vocabulary]
    for row, (index, window) in enumerate(zip(indices, together, strict=True)):
        last = len(inputs[row]) - 1
        scored = logits[row, last - window.scored : last]  # [scored, vocabulary]
        yield ScoredRows(index, window, scored, windows.targets(window).to(logits.device))


def _batch_limit(model: PreTrainedModel, window: int) -> int:
    return max(1, LOGIT_BYTES // (4 * window * vocabulary_of(model)))
