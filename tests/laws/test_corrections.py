"""Laws of every correction of the table: what it writes to, and that it says what it bought."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from evidence import quantized_block
from families import model_of, tiny_llama
from fracbit.errors import RecipeError
from fracbit.models.correction import CORRECTIONS, correction, error
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.models.train import weigh
from fracbit.numerics import decode

WEIGHED = {"train": {"weigh": weigh}}
"""How corrections weigh the tokens of the error that they report, where not alike."""


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_correction_writes_to_norms_alone_and_says_what_it_bought(name: str, family: str) -> None:
    model = tiny_llama() if family == "llama" else model_of(family)
    block, evidence = quantized_block(model)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    judge = partial(error, evidence=evidence, **WEIGHED.get(name, {}))
    start = judge(block)
    report = correction(name)(block, family_of(model), evidence, silent)
    assert report.before == pytest.approx(start)
    assert report.kept != "none"
    changed = {key for key, value in block.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("norm" in key or "ln_" in key for key in changed)
    assert all(isinstance(value, torch.nn.Parameter) for value in block.parameters())
    # Linears that it changed are handed back packed, in the scheme and form that they had.
    for linear, packed in report.packed.items():
        like = evidence.packed[linear]
        assert (packed.scheme, packed.shape) == (like.scheme, like.shape)
        set_weight(block.get_submodule(linear), decode(packed))
    # Decoded weights differ from those that were judged by the rounding of their product with the scale.
    assert report.after == pytest.approx(judge(block), rel=1e-5 if report.packed else 1e-6)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_repeats_itself(name: str) -> None:
    model = tiny_llama()
    first, second = (
        correction(name)(*(quantized_block(model)[:1]), family_of(model), quantized_block(model)[1], silent)
        for _ in range(2)
    )
    assert (first.before, first.after, first.kept) == (second.before, second.after, second.kept)
    assert first.packed.keys() == second.packed.keys()
    assert all(
        torch.equal(decode(packed), decode(second.packed[key])) for key, packed in first.packed.items()
    )


@pytest.mark.parametrize("name", CORRECTIONS)
def test_options_of_a_correction_are_the_fields_of_its_record(name: str) -> None:
    for key, value in correction(name):
        assert (
            getattr(correction(f"{name}:{key}={value / 2 if isinstance(value, float) else value + 1}"), key)
            != value
        )
        with pytest.raises(RecipeError, match=rf"{key} is '-1'; it should be"):
            correction(f"{name}:{key}=-1")
    with pytest.raises(RecipeError, match=f"correction {name} has no key 'colour'"):
        correction(f"{name}:colour=3")
