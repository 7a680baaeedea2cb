"""The float model's predictions, kept once for many comparisons.

A sweep compares dozens of quantized models with one float model over one text. Running the float model each
time doubles the work, so its log-probabilities can be kept: in memory, or in one safetensors file that is
mapped, never read whole. The array is [tokens, vocabulary], all of it: tails matter to a divergence.
float16 halves it and moves a divergence by about 1e-4 nats; float32 is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import DataError, FormatError, OutputError, WeightError
from fracbit.evaluation.logits import Progress, ScoredRows, row_chunks, run_order, scored_rows, vocabulary_of
from fracbit.evaluation.perplexity import broken_window
from fracbit.evaluation.windows import Ids, Windowing, plan_windows

StoredType = Literal["float16", "float32"]

_DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
_TENSOR = "log_probabilities"


@dataclass(frozen=True, eq=False)
class FloatLogits:
    """Log-probabilities of a float model at every scored id of a plan.

    rows: from a slice of the scored ids, in the order of the plan's windows, to [ids, vocabulary]. key:
    plan_key of the plan they belong to. tokens, vocabulary: the size of the whole.
    """

    rows: Callable[[slice], Tensor]
    key: str
    tokens: int
    vocabulary: int


def plan_key(plan: Windowing) -> str:
    """SHA-256 of what decides the predictions besides the model: ids, windows and the id before them."""
    digest = hashlib.sha256(json.dumps(plan.protocol.to_json(), sort_keys=True).encode())
    for document in plan.documents:
        digest.update(f"{len(document)}:".encode())
        digest.update(document.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def keep_logits(
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int,
    stride: int | None = None,
    bos: int | None = None,
    batch: int = 8,
    path: Path | None = None,
    dtype: StoredType = "float32",
    progress: Progress | None = None,
) -> FloatLogits:
    """Run the float model over the text and keep its log-probabilities, in memory or in the file `path`.

    window, stride, bos, batch, progress: as for perplexity. dtype: of the kept values. The file is written
    under a temporary name and renamed, so that it is whole or absent.

    Raises: DataError, WeightError as perplexity does; OutputError when the file cannot be written.
    """
    plan = plan_windows(ids, window=window, stride=stride, bos=bos)
    pieces = _log_probabilities(model, plan, batch, _DTYPES[dtype][0], progress)
    shape = (plan.protocol.tokens, vocabulary_of(model))
    if path is not None:
        _write(path, pieces, plan, shape, dtype)
        return open_logits(path)
    kept = torch.empty(shape, dtype=_DTYPES[dtype][0])
    for start, values in pieces:
        kept[start : start + len(values)] = values
    return FloatLogits(kept.__getitem__, plan_key(plan), *shape)


def open_logits(path: Path) -> FloatLogits:
    """Map a file of keep_logits. Raises: FormatError when it is none, or is cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            key = (file.metadata() or {}).get("plan")
            values = file.get_slice(_TENSOR)
            tokens, vocabulary = values.get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(
            f"{path} holds no kept logits ({error}): delete it and let them be made anew."
        ) from error
    if key is None:
        raise FormatError(f"{path} is not by fracbit: it does not say which text its logits belong to.")
    return FloatLogits(values.__getitem__, key, tokens, vocabulary)


def reference_rows(reference: FloatLogits, plan: Windowing) -> Iterator[ScoredRows]:
    """The kept rows in the order in which scored_rows runs the windows of `plan`.

    Raises: DataError when they were made over another text or with other windows.
    """
    if reference.key != plan_key(plan):
        raise DataError(
            "the kept logits belong to another text, window, stride or BOS: make them anew with keep_logits."
        )
    starts = _starts(plan)
    for index in run_order(plan):
        window = plan.windows[index]
        rows = reference.rows(slice(starts[index], starts[index] + window.scored))
        yield ScoredRows(index, window, rows, plan.targets(window))


def _starts(plan: Windowing) -> list[int]:
    """Where each window's rows begin."""
    return [0, *accumulate(window.scored for window in plan.windows)]


def _log_probabilities(
    model: PreTrainedModel, plan: Windowing, batch: int, dtype: torch.dtype, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Pieces [ids, vocabulary] with the row they begin at."""
    starts = _starts(plan)
    for rows in scored_rows(model, plan, batch=batch, progress=progress):
        for chunk in row_chunks(*rows.logits.shape):
            values = torch.log_softmax(rows.logits[chunk].float(), dim=1)
            # One NaN logit makes its whole row NaN.
            if bool(values[:, 0].isnan().any()):
                raise WeightError(broken_window(rows, math.nan))
            yield starts[rows.index] + chunk.start, values.to("cpu", dtype)


def _write(
    path: Path,
    pieces: Iterator[tuple[int, Tensor]],
    plan: Windowing,
    shape: tuple[int, int],
    dtype: StoredType,
) -> None:
    """A safetensors file, piece by piece: the library's own writer wants the whole tensor in memory."""
    kind, name = _DTYPES[dtype]
    row_bytes = shape[1] * kind.itemsize
    tensor = {"dtype": name, "shape": list(shape), "data_offsets": [0, shape[0] * row_bytes]}
    header = json.dumps({"__metadata__": {"plan": plan_key(plan)}, _TENSOR: tensor}).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for start, values in pieces:
                file.seek(8 + len(header) + start * row_bytes)
                file.write(values.contiguous().numpy().tobytes())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: the kept logits ({shape[0] * row_bytes} bytes) cannot be written ({error.strerror}). "
            "Choose another folder, or dtype float16."
        ) from error
