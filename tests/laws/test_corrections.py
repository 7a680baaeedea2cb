"""Laws of every correction of the table: it moves norms alone and says what it bought."""

from __future__ import annotations

import pytest
import torch

from evidence import quantized_block
from families import tiny_llama
from fracbit.models.correction import CORRECTIONS, error
from fracbit.models.find import family_of


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_moves_norms_alone_and_says_what_it_bought(correction: str) -> None:
    model = tiny_llama()
    block, evidence = quantized_block(model)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    start = error(block, evidence)
    report = CORRECTIONS[correction](block, family_of(model), evidence, 0.5)
    assert report.before == pytest.approx(start)
    assert report.after == pytest.approx(error(block, evidence))
    assert report.kept != "none"
    changed = {key for key, value in block.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("norm" in key for key in changed)
    assert all(isinstance(value, torch.nn.Parameter) for value in block.parameters())
