"""One tiny Llama with random gains for what does not depend on the family."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

import families


@pytest.fixture
def llama() -> PreTrainedModel:
    return families.model_of("llama")
