"""Texts and conversations to ids, with an explicit rule for the BOS.

With `bos=auto` the tokenizer decides, as in transformers' own examples: Llama and Gemma put a BOS first, GPT-2
and Qwen do not. A conversation is rendered by the tokenizer's chat template, which writes its own special
tokens; none are added to it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fracbit.data.raw import Message, RawText, RawTexts
from fracbit.errors import DataError, blamed_on
from fracbit.records.text_source import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256
LONGEST = 20.0  # seconds that a chat template may take for one conversation


def encode_texts(raw: RawTexts, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Ids of every document, int64 [ids] each.

    Raises: DataError for a conversation without a template, for bos=always without a BOS, and for a text
    that yields no ids.
    """
    documents: list[np.ndarray] = []
    for start in range(0, len(raw.pieces), BATCH):
        documents.extend(_encode(raw.pieces[start : start + BATCH], raw.names[start:], source, tokenizer))
    return documents


def _encode(
    pieces: Sequence[RawText], names: Sequence[str], source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    rows: dict[int, list[int]] = {}
    for chat in (False, True):
        some = [number for number, piece in enumerate(pieces) if isinstance(piece, str) is not chat]
        texts = [
            _written(pieces[number], tokenizer, f"{source.location}, {names[number]}") for number in some
        ]
        opening = [] if chat or not some else _opening(source, tokenizer)
        special = source.bos == "auto" and not chat
        # verbose=False: a text longer than the model's window is intended here and needs no warning.
        with blamed_on(f"{source.location}: the tokenizer cannot read this text", DataError):
            found = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if some else []
        rows |= {number: opening + row if row else [] for number, row in zip(some, found, strict=True)}
    for number in range(len(pieces)):
        if not rows[number]:
            raise DataError(f"{source.location}, {names[number]}: the tokenizer gives no ids for this text.")
        yield np.array(rows[number], dtype=np.int64)


def _written(piece: RawText, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    return piece if isinstance(piece, str) else render_chat(piece, tokenizer, where)


def _opening(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids to put before a text."""
    if source.bos != "always":
        return []
    if tokenizer.bos_token_id is None:
        raise DataError(f"{source}: bos=always, but the tokenizer has no BOS. Use bos=auto or bos=never.")
    return [int(tokenizer.bos_token_id)]


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text of a conversation, as the tokenizer's chat template writes it.

    Raises: DataError when there is no template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no chat template for it: add "
            "chat_template.jinja to the model's folder, or name a field of plain text with ?field=NAME."
        )
    late = f"{where}: the chat template has not ended after {LONGEST:g} s; put one that ends into the model's folder"
    with blamed_on(f"{where}: the chat template refuses the conversation", DataError), _ending(late):
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))


class _EndlessError(Exception):
    """Raised from outside in a template that does not end."""


@contextmanager
def _ending(otherwise: str) -> Iterator[None]:
    """Raise `DataError` in this thread where its Python code runs longer than `LONGEST`: templates come with models."""
    here = ctypes.c_ulong(threading.get_ident())
    timer = threading.Timer(
        LONGEST, ctypes.pythonapi.PyThreadState_SetAsyncExc, (here, ctypes.py_object(_EndlessError))
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    except _EndlessError:
        raise DataError(otherwise) from None
    finally:
        timer.cancel()
