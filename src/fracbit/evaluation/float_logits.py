"""The float model's predictions in a file, kept once for many comparisons.

The safetensors file is memory-mapped and never read whole. It holds the full [tokens, vocabulary], because
tails matter for a divergence. float16 halves it and changes a divergence by about 1e-4 nats; float32 is exact.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import FormatError, OutputError
from fracbit.evaluation.float_reference import Predictions, check_key, check_logs, expected_from
from fracbit.evaluation.logits import row_chunks, run_order, scored_rows, vocabulary_of
from fracbit.evaluation.windows import Windowing
from fracbit.records.progress import Progress

FileType = Literal["float16", "float32"]

_DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
_TENSOR = "log_probabilities"
_KEY = "plan"
"""The name of the windowing's key in the file's metadata."""


@dataclass(frozen=True, eq=False)
class FloatLogits:
    """Log-probabilities of a float model at every scored id of a text.

    rows: a function from a slice of the scored ids, in the order of the windows, to [ids, vocabulary]. key: of
    their windowing. tokens, vocabulary: the shape of all rows.
    """

    rows: Callable[[slice], Tensor]
    key: str
    tokens: int
    vocabulary: int

    def predictions(self, windows: Windowing, batch: int) -> Iterator[Predictions | None]:
        check_key(self.key, windows)
        starts = _starts(windows)
        for index in run_order(windows):
            end = starts[index] + windows.all[index].scored
            logs = self.rows(slice(starts[index], end))  # [scored, vocabulary]
            yield partial(expected_from, logs)


def keep_logits(
    model: PreTrainedModel,
    windows: Windowing,
    path: Path,
    *,
    batch: int = 8,
    dtype: FileType = "float32",
    progress: Progress | None = None,
) -> FloatLogits:
    """Run the float model over the text and keep its log-probabilities in the file `path`.

    batch: windows run together. dtype: of the kept values. The file is written under a temporary name and
    renamed, so that it is complete or absent.

    Raises: DataError, WeightError as judge does; OutputError when the file cannot be written.
    """
    kind = _DTYPES[dtype][0]
    pieces = _log_probabilities(model, windows, batch=batch, dtype=kind, progress=progress)
    shape = (windows.protocol.tokens, vocabulary_of(model))
    _write(path, pieces, key=windows.key, shape=shape, dtype=dtype)
    return open_logits(path)


def open_logits(path: Path) -> FloatLogits:
    """Map a file of keep_logits. Raises: FormatError for another or a truncated file."""
    try:
        with safe_open(path, framework="pt") as file:
            key = (file.metadata() or {}).get(_KEY)
            values = file.get_slice(_TENSOR)
            tokens, vocabulary = values.get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path} holds no kept logits ({error}): delete it and make it again.") from error
    if key is None:
        raise FormatError(f"{path} was not written by fracbit: it does not name the text of its logits.")
    return FloatLogits(values.__getitem__, key, tokens, vocabulary)


def _starts(windows: Windowing) -> list[int]:
    """Where each window's rows begin."""
    return [0, *accumulate(window.scored for window in windows.all)]


def _log_probabilities(
    model: PreTrainedModel, windows: Windowing, *, batch: int, dtype: torch.dtype, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Pieces [ids, vocabulary] with the row they begin at."""
    starts = _starts(windows)
    for done, rows in enumerate(scored_rows(model, windows, batch=batch), 1):
        for chunk in row_chunks(*rows.logits.shape):
            logs = torch.log_softmax(rows.logits[chunk].float(), dim=1)  # [ids, vocabulary]
            check_logs(rows, logs)
            yield starts[rows.index] + chunk.start, logs.to("cpu", dtype)
        if progress is not None:
            progress("float model", done, len(windows.all))


def _write(
    path: Path,
    pieces: Iterator[tuple[int, Tensor]],
    *,
    key: str,
    shape: tuple[int, int],
    dtype: FileType,
) -> None:
    """Write a safetensors file piece by piece: the library's own writer needs the whole tensor in memory."""
    kind, name = _DTYPES[dtype]
    row_bytes = shape[1] * kind.itemsize
    tensor = {"dtype": name, "shape": list(shape), "data_offsets": [0, shape[0] * row_bytes]}
    header = json.dumps({"__metadata__": {_KEY: key}, _TENSOR: tensor}).encode()
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
