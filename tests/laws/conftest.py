"""A model of every family, one test after another."""

from __future__ import annotations

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

import families


@pytest.fixture(params=list(families.CONFIGS))
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return families.config_of(request.param)


@pytest.fixture
def model(config: PreTrainedConfig) -> PreTrainedModel:
    return families.build(config)
