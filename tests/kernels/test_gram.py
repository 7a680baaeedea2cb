"""The Gram matrix of bfloat16 activations: native kernel = its definition, at odd shapes; what does not fit is refused."""

import pytest
import torch

from fracbit.errors import WeightError
from fracbit.kernels.cpu import NATIVE
from fracbit.kernels.gram import add_gram
from fracbit.numerics.stats import add_inputs, empty, merge

here = pytest.mark.skipif(NATIVE is None or not NATIVE.has_gram(), reason="no native bfloat16 products")


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 5), (513, 100), (1030, 48), (600, 97), (3, 300)])
def test_equals_the_definition(tokens: int, width: int):
    x = torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    start = torch.eye(width)
    for part in (x[:, :width], x[:, ::2]):  # rows apart, and columns apart
        expected = start.double() + part.double().T @ part.double()
        found = add_gram(start, part)
        assert torch.equal(found, found.T)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(start, torch.eye(width)), "what was passed in is not written to"


def test_statistics_are_those_of_the_numbers_themselves():
    x = torch.randn(300, 65, generator=torch.Generator().manual_seed(1)).bfloat16()
    stats = add_inputs(empty(65), x, add_gram)
    plain = add_inputs(empty(65), x.float())
    parts = merge(add_inputs(empty(65), x[:111], add_gram), add_inputs(empty(65), x[111:], add_gram))
    for other in (plain, parts):
        assert stats.tokens == other.tokens
        torch.testing.assert_close(stats.gram, other.gram, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(stats.energy, other.energy, rtol=1e-5, atol=0)
        assert torch.equal(stats.absmax, other.absmax)
    x[200, 3] = float("nan")
    with pytest.raises(WeightError, match="1 of 300"):
        add_inputs(empty(65), x, add_gram)


@here
def test_the_order_of_sums_does_not_depend_on_threads():
    assert NATIVE is not None
    x = torch.randn(700, 130, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = [torch.zeros(130, 130) for _ in range(2)]
    for threads, gram in zip((1, 3), found, strict=True):
        NATIVE.add_gram(x, gram, threads)
    assert torch.equal(*found)


@here
def test_what_does_not_fit_is_refused():
    assert NATIVE is not None
    x, gram = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(6, 6)
    for bad_x, bad_gram in (
        (x.float(), gram),
        (x[0], gram),
        (x, gram.half()),
        (x, gram[:5]),
        (x[:, ::2], gram[:3, :3]),
    ):
        with pytest.raises(ValueError, match=r"x must|gram|layout|contiguous|shape"):
            NATIVE.add_gram(bad_x, bad_gram, 1)
