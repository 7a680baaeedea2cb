"""A byte tokenizer with and without a BOS and a chat template, and the shared data where it is at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from transformers import PreTrainedTokenizerFast

from texts import byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('who is this?') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def tokenizers() -> MakeTokenizer:
    return partial(byte_tokenizer, bos=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(bos=True, template=TEMPLATE)
