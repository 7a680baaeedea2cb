"""`deterministic`: a row of a packed product, and of a whole model, has the same bits in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fracbit
from families import tiny_llama
from fracbit.errors import KernelError
from fracbit.kernels import PackedLinear, linear_op, spec_of
from fracbit.kernels.cpu import NATIVE, tiles_from
from fracbit.models.install import make_deterministic
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics.packed import parts_of
from fracbit.numerics.ranges import quantize_tensor
from fracbit.records.inputs import Inputs
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme, parse_scheme

WORDS = ("int4/64", "int3z/64", "nf4/64", "int4/64 out", "int2/20", "kmeans4/64", "int8/row")
native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


@native
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(word: str, dtype: torch.dtype) -> None:
    """Batches that would go by tiles, and a few; through the layer and through the operator."""
    weight = quantize_tensor(torch.randn(96, 256), parse_scheme(word))
    x = torch.randn(130, 256).to(dtype)
    parts = dict(parts_of(weight))
    spec = spec_of(weight.scheme, weight.shape, parts, deterministic=True)
    for path in ("float", "int8"):
        linear = PackedLinear(weight, path, deterministic=True)  # type: ignore[arg-type]
        alone = torch.cat([linear(row[None]) for row in x])
        for count in (2, 16, 33, 64, 130):
            assert torch.equal(linear(x[:count]), alone[:count])
            assert torch.equal(linear_op(x[:count], list(parts.values()), spec, path), alone[:count])


@native
def test_without_it_tiles_have_other_bits() -> None:
    """Else the law above would hold by accident."""
    linear = PackedLinear(quantize_tensor(torch.randn(96, 256), Scheme("int", 4, 64)))
    x = torch.randn(130, 256)
    assert tiles_from(False, torch.float32) < 130
    assert not torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [1, 9, 40])
@pytest.mark.parametrize("inputs", [None, "int8/token"])
def test_a_batch_of_sixteen_is_sixteen_batches_of_one(
    tmp_path: Path, threads: int, length: int, inputs: str | None
) -> None:
    """Of a whole model whose sizes are multiples of 32; others differ in torch's own operations."""
    tiny_llama(num_hidden_layers=2, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "float")
    fracbit.quantize(
        Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", 8, "row")), tmp_path / "q", progress=None
    )
    model = fracbit.load(tmp_path / "q", deterministic=True)
    for module in model.modules():
        if isinstance(module, QuantLinear) and inputs:
            module.inputs = Inputs("int", 8)
    ids, before = torch.randint(3, 90, (16, length)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            together = model(ids).logits  # [16, length, vocabulary]
            assert torch.equal(together, torch.cat([model(row[None]).logits for row in ids]))
    finally:
        torch.set_num_threads(before)
    make_deterministic(model, False)
    assert not any(module.deterministic for module in model.modules() if isinstance(module, QuantLinear))


def test_where_no_kernel_is_deterministic_it_is_refused() -> None:
    from fracbit.kernels.reference import REFERENCE

    with pytest.raises(KernelError, match="leave `deterministic` out"):
        REFERENCE.runner(deterministic=True)
