"""Which ids are fed to the model together, and which of them are scored.

The windows are those of the transformers documentation ("Perplexity of fixed-length models"): a window of
`window` ids moves by `stride`; ids that an earlier window has scored are context only. The first id of a
document has no context and is never scored, nor is the first id of a window that does not overlap the one
before it. With `bos`, every window opens with that id (context only), and every id of the document is scored.

When two tools print different perplexities for one model, they usually differ in this. So the windows can be
inspected (`Windowing`), and their rule is a record (`Protocol`) that is printed with every figure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from fracbit.errors import DataError

Ids = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Window:
    """One piece of a document that the model sees at once; the last `scored` of its ids count."""

    document: int
    begin: int
    end: int
    scored: int

    def __str__(self) -> str:
        return f"ids {self.begin}..{self.end - 1} of document {self.document}"


@dataclass(frozen=True)
class Protocol:
    """How a figure on text was measured. It is printed with the figure, which means nothing without it.

    window, stride: ids. bos: the id put before every window, or None when the ids were fed as they are.
    documents: how many were windowed separately (1: one stream). tokens: scored ids.
    """

    window: int
    stride: int
    bos: int | None
    documents: int
    tokens: int

    def __str__(self) -> str:
        start = "no id added" if self.bos is None else f"id {self.bos} before each window"
        pieces = "one stream" if self.documents == 1 else f"{self.documents} documents, each on its own"
        return f"{self.tokens} tokens scored, window {self.window}, stride {self.stride}, {start}, {pieces}"

    def to_json(self) -> dict[str, object]:
        """The record as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Windowing:
    """The windows over some documents: all of them, in the order of the text.

    documents: int64 [ids] each, without the id that `bos` adds.
    """

    documents: tuple[Tensor, ...]
    all: tuple[Window, ...]
    protocol: Protocol

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything except the model that decides predictions: ids, windows and the id before them."""
        digest = hashlib.sha256(json.dumps(self.protocol.to_json(), sort_keys=True).encode())
        for document in self.documents:
            digest.update(f"{len(document)}:".encode())
            digest.update(document.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def inputs(self, window: Window) -> Tensor:
        """The ids [length] that the model is fed for `window`."""
        ids = self.documents[window.document][window.begin : window.end]
        if self.protocol.bos is None:
            return ids
        return torch.cat([ids.new_tensor([self.protocol.bos]), ids])  # [length]

    def targets(self, window: Window) -> Tensor:
        """The ids [scored] that are scored."""
        return self.documents[window.document][window.end - window.scored : window.end]  # [scored]


def cut_windows(ids: Ids, *, window: int, stride: int | None = None, bos: int | None = None) -> Windowing:
    """Cut windows from one stream (a 1-D tensor) or from documents (a sequence of 1-D tensors).

    window: ids the model sees at once, the added `bos` included, at least 2. stride: how far the window
    moves, 1..window (default: window, no overlap); with `bos` at most window - 1, which is then the default.

    Raises: DataError for an impossible window or stride and for a document without an id to score.
    """
    # Check the request.
    room = window if bos is None else window - 1
    stride = room if stride is None else stride
    _check_window(window, stride, room)
    documents = tuple(_without_bos(document, bos) for document in _documents(ids))
    _check_documents(documents, 1 if bos is not None else 2)
    # Windows over each document.
    context = 0 if bos is not None else 1
    windows = tuple(
        piece
        for index, document in enumerate(documents)
        for piece in _windows(index, len(document), room=room, stride=stride, context=context)
    )
    tokens = sum(piece.scored for piece in windows)
    return Windowing(
        documents, windows, Protocol(window, stride, bos, documents=len(documents), tokens=tokens)
    )


def _windows(document: int, length: int, *, room: int, stride: int, context: int) -> list[Window]:
    """Windows over one document; the first `context` ids of a window have no context and are not scored."""
    windows = []
    scored_to = 0
    for begin in range(0, length, stride):
        end = min(begin + room, length)
        scored = min(end - scored_to, end - begin - context)
        if scored > 0:
            windows.append(Window(document, begin, end, scored))
        scored_to = end
        if end == length:
            break
    return windows


def _documents(ids: Ids) -> list[Tensor]:
    documents = [ids] if isinstance(ids, Tensor) else list(ids)
    for index, document in enumerate(documents):
        if document.dim() != 1:
            raise DataError(
                f"document {index} has the shape {list(document.shape)}; each must be a 1-D tensor of ids. "
                "Pass a matrix of samples as list(matrix)."
            )
    return [document.to(torch.int64) for document in documents]  # [ids] each


def _without_bos(document: Tensor, bos: int | None) -> Tensor:
    """A document that already opens with `bos` must not get it twice."""
    if bos is not None and len(document) > 0 and int(document[0]) == bos:
        return document[1:]
    return document


def _check_window(window: int, stride: int, room: int) -> None:
    if room < 1 or window < 2:
        raise DataError(f"window {window} leaves nothing to score: it must be at least 2 ids.")
    if stride < 1:
        raise DataError(f"stride {stride} does not move the window: it must be 1..{room}.")
    if stride > room:
        raise DataError(
            f"stride {stride} is longer than the {room} ids of text in a window, so ids between two windows "
            f"would never be scored: use a stride of 1..{room}."
        )


def _check_documents(documents: Sequence[Tensor], least: int) -> None:
    if not documents:
        raise DataError("there are no documents to evaluate: the text is empty.")
    for index, document in enumerate(documents):
        if len(document) < least:
            raise DataError(
                f"document {index} has {len(document)} ids and at least {least} are needed to score one: "
                "the text is empty or too short. Leave such documents out."
            )
