"""Causal attention of whole sequences: native kernel = torch's at odd shapes; what does not fit is refused or left to torch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fracbit.kernels.attention import CACHE_BYTES, attend_causal, attends
from fracbit.kernels.cpu import NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None or not NATIVE.has_causal(), reason="no native attention here")


def drawn(
    heads: int, shared: int, tokens: int, head: int, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a model hands them over: heads stand beside each other, tokens apart."""
    source = torch.Generator().manual_seed(tokens)
    queries, keys, values = (
        torch.randn(2, tokens, n, head, generator=source) for n in (heads, shared, shared)
    )
    return (size * queries).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


@pytest.mark.parametrize(
    ("heads", "shared", "tokens", "head"), [(1, 1, 1, 8), (4, 2, 31, 8), (6, 3, 64, 16), (3, 1, 97, 40), (2, 2, 200, 64)]
)  # fmt: skip
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_equals_torch(heads: int, shared: int, tokens: int, head: int, size: float):
    queries, keys, values = drawn(heads, shared, tokens, head, size)
    assert attends(queries, keys, values)
    exact = [x.double() for x in (queries, keys, values)]
    expected = scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )
    torchs = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=0.3, enable_gqa=True)
    found = attend_causal(queries, keys, values, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6 * size)
    error, theirs = (float((x - expected).abs().max()) for x in (found, torchs.transpose(1, 2)))
    assert error <= max(3 * theirs, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_are_computed_in_fp32(dtype: torch.dtype):
    queries, keys, values = (x.to(dtype) for x in drawn(4, 2, 50, 16))
    assert attends(queries, keys, values)
    found = attend_causal(queries, keys, values, 0.3)
    assert found.dtype == dtype
    assert torch.equal(found, attend_causal(queries.float(), keys.float(), values.float(), 0.3).to(dtype))


def test_numbers_that_are_none_stay_visible():
    queries, keys, values = drawn(2, 1, 40, 8)
    keys[0, 0, 7, 3] = torch.nan
    found = attend_causal(queries, keys, values, 1.0)
    assert found[0, :7].isfinite().all()
    assert found[0, 7:].isnan().all()
    assert found[1].isfinite().all()


def test_what_does_not_fit_is_left_to_torch():
    queries, keys, values = drawn(4, 2, 20, 8)
    assert attends(queries, keys, values)
    assert not attends(queries.double(), keys.double(), values.double())
    assert not attends(queries[:, :, :1], keys, values)  # a step of decoding
    assert not attends(queries[..., :6], keys[..., :6], values[..., :6])
    assert not attends(queries.clone().requires_grad_(), keys, values)
    tokens = CACHE_BYTES // (8 * 8) + 1
    assert not attends(*(x[:, :, :1].expand(-1, -1, tokens, -1) for x in (queries, keys, values)))


def test_what_the_kernel_cannot_read_is_refused():
    assert NATIVE is not None
    queries, keys, values = drawn(4, 2, 20, 8)
    out = torch.empty_like(queries)
    for wrong in (
        (queries.double(), keys, values, out),
        (queries, keys[:, :, 1:], values, out),
        (queries, keys, values[:1], out),
        (queries[:, :3], keys, values, out[:, :3]),
        (queries[..., ::2], keys, values, out),
        (queries[..., :4], keys[..., :4], values[..., :4], out[..., :4]),
        (queries[0], keys, values, out),
    ):
        with pytest.raises(ValueError, match=r"must|should"):
            NATIVE.attend_causal(*wrong, 1.0, 1)
