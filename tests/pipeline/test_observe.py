"""Experts with too few tokens: who borrows, what, and what is said of it; and where a bad activation is placed."""

import pytest
import torch

from fracbit.errors import WeightError
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.pipeline.quantize.observe import FEW_TOKENS, UNREACHED, Observer, borrow

UP, DOWN = "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"


def seen(tokens: int, width: int = 4) -> Stats:
    return add_inputs(
        empty(width), torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    )


def test_an_expert_with_enough_tokens_keeps_its_own_and_the_others_take_all() -> None:
    stats = {UP.format(0): seen(FEW_TOKENS), UP.format(1): seen(3), DOWN.format(0): seen(FEW_TOKENS, 6)}
    groups = [(UP.format(0),), (UP.format(1),), (UP.format(2),), (DOWN.format(1),)]
    found, notes = borrow(stats, groups)
    assert found[UP.format(0)] is stats[UP.format(0)]
    for name in (UP.format(1), UP.format(2)):
        assert found[name].tokens == FEW_TOKENS + 3
        assert torch.allclose(found[name].gram, stats[UP.format(0)].gram + stats[UP.format(1)].gram)
    assert found[DOWN.format(1)].gram.shape == (6, 6), "of their own kind only"
    assert set(notes) == {UP.format(1), UP.format(2), DOWN.format(1)}
    assert (
        notes[UP.format(1)]
        == f"expert saw 3 tokens, fewer than 128: quantized with {FEW_TOKENS + 3} tokens of all experts"
    )
    assert notes[UP.format(2)].startswith("expert saw 0 tokens")


def test_where_no_expert_saw_anything_there_is_no_data() -> None:
    found, notes = borrow({}, [(UP.format(0),)])
    assert found == {UP.format(0): None}
    assert notes[UP.format(0)].endswith("quantized with no data")


def test_a_dense_layer_never_borrows() -> None:
    found, notes = borrow({"mlp.up_proj": seen(2)}, [("mlp.up_proj",), ("mlp.down_proj",)])
    assert found["mlp.up_proj"].tokens == 2
    assert found["mlp.down_proj"] is None
    assert notes == {"mlp.down_proj": UNREACHED}


def test_a_bad_activation_names_its_sample() -> None:
    observer = Observer("model.layers.3", gram=True, length=5)
    observer("mlp.up_proj", torch.zeros(10, 4))
    bad = torch.zeros(10, 4)
    bad[7, 1] = float("nan")
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp\.up_proj, sample 3: 1 of 10 input rows"):
        observer("mlp.up_proj", bad)


def test_an_activation_whose_square_is_not_finite_names_its_sample() -> None:
    observer = Observer("model.layers.3", gram=True, length=5)
    large = torch.zeros(10, 4)
    large[7, 1] = 1e30
    with pytest.raises(
        WeightError, match=r"up_proj, sample 1: squares of inputs of up to 1e\+30 pass the range"
    ):
        observer("mlp.up_proj", large)
