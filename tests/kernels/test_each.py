"""Weights of one shape, each on rows of its own, in one call, as experts of a mixture are: what each gives alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fracbit.errors import KernelError
from fracbit.kernels import PackedLinear, multiply_each
from fracbit.kernels import cpu as native
from fracbit.models import experts as mixtures
from fracbit.models.experts import SplitExperts, split_experts
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import parse_scheme

WORDS = ("int4/64", "nf4/32", "int3z/64 out", "int4/17", "kmeans3/64 s=int8:256", "int8/row")
SIZES = ([1, 1, 1], [0, 5, 0], [2, 0, 40], [0, 0, 0], [70, 1, 3], [3, 100, 100])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_together_is_each_alone(word: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    weights = [quantize_tensor(torch.randn(33, 128), parse_scheme(word)) for _ in sizes]
    for kind in (torch.float32, torch.bfloat16):
        for activations, deterministic in (("float", False), ("int8", False), ("float", True)):
            if deterministic and native.NATIVE is None:
                continue
            linears = [PackedLinear(weight, activations, deterministic) for weight in weights]  # type: ignore[arg-type]
            x = torch.randn(sum(sizes), 128).to(kind)
            alone = torch.cat([each(part) for each, part in zip(linears, x.split(sizes), strict=True)])
            check_same(multiply_each(linears, x, sizes), alone, max(sizes))


def check_same(found: torch.Tensor, wanted: torch.Tensor, rows: int) -> None:
    """To the bit for a few rows. Many are multiplied by torch, whose last bits depend on where in memory they lie."""
    if rows < 32:
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


def test_other_shapes_and_gradients_go_one_by_one() -> None:
    torch.manual_seed(0)
    weights = [quantize_tensor(torch.randn(rows, 64), parse_scheme("int4/32")) for rows in (16, 16, 16)]
    linears = [PackedLinear(weights[0]), PackedLinear(weights[1], "int8"), PackedLinear(weights[2])]
    x = torch.randn(6, 64)
    alone = torch.cat([each(part) for each, part in zip(linears, x.split([1, 2, 3]), strict=True)])
    assert torch.equal(multiply_each(linears, x, [1, 2, 3]), alone)
    x.requires_grad_()
    multiply_each(linears, x, [1, 2, 3]).sum().backward()
    assert x.grad is not None
    with pytest.raises(KernelError, match="do not fit"):
        multiply_each(linears[:1] * 2, torch.randn(3, 63), [1, 2])


@pytest.mark.skipif(native.NATIVE is None, reason="the native module is not built")
def test_wrong_arguments_are_refused() -> None:
    weights = [
        native.prepare(quantize_tensor(torch.randn(rows, columns), parse_scheme("int4/32")), "float").weight
        for rows, columns in ((8, 64), (8, 64), (9, 64), (8, 32))
    ]
    x, y = torch.randn(5, 64), torch.empty(5, 8)
    native.NATIVE.multiply_each(weights[:2], x, y, [2, 3], False, 1)
    for arguments in (
        ([], x, y, []), (weights[:2], x, y, [5]), (weights[:2], x, y, [2, 2]), (weights[:2], x, y, [6, -1]),
        (weights[:2], x, y, [2**62, 2**62]), (weights[:2], x, y[:4], [2, 3]), (weights[:2], x[:, :32], y, [2, 3]),
        ([weights[0], weights[2]], x, y, [2, 3]), ([weights[0], weights[3]], x, y, [2, 3]), ([weights[0], None], x, y, [2, 3]),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            native.NATIVE.multiply_each(*arguments, False, 1)


def mixture(word: str = "int4/32", count: int = 6) -> SplitExperts:
    """A random packed mixture of 48 x 80."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=48, intermediate_size=80, num_local_experts=count)
    config._experts_implementation = "eager"
    model = nn.Module()
    model.experts = MixtralExperts(config)
    for parameter in model.experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    split_experts(model)
    split = model.experts
    assert isinstance(split, SplitExperts)
    for number in range(count):
        for name, linear in list(split[number].named_children()):
            packed = quantize_tensor(linear.weight.detach(), parse_scheme(word))  # type: ignore[union-attr, operator]
            made = QuantLinear(parse_scheme(word), packed.shape)
            made.fill(packed)
            setattr(split[number], name, made)
    return split


def routed(tokens: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, 48).to(kind)
    shares, chosen = torch.randn(tokens, 6).softmax(-1).topk(3)
    return x, chosen, shares.to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 60, 300])
def test_experts_together_are_experts_one_by_one(
    tokens: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook on one of their linears sees its inputs: then they are called one by one."""
    split = mixture()
    given = routed(tokens, kind)
    with torch.no_grad():
        together = split(*given)
        monkeypatch.setattr(mixtures, "TOGETHER", 0)
        alone = split(*given)
        monkeypatch.undo()
        seen: list[int] = []
        split[2].up_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))  # type: ignore[union-attr]
        watched = split(*given)
    most = int(given[1].flatten().bincount().max())
    check_same(together, alone, most)
    check_same(together, watched, most)
    assert sum(seen) == int((given[1] == 2).sum())


def test_a_few_tokens_take_a_call_for_each_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates, ups and downs of all experts that a token is routed to: three calls of the kernel, not three for each expert."""
    if native.NATIVE is None or native.tiles_from(False, torch.float32) == math.inf:
        pytest.skip("the native module is not built")
    calls: list[list[int]] = []
    usual = native.CPU.run_each
    assert usual is not None

    def count(prepared: object, x: torch.Tensor, sizes: list[int], alike: bool) -> torch.Tensor:
        calls.append(list(sizes))
        return usual(prepared, x, sizes, alike)  # type: ignore[arg-type]

    split = mixture()
    object.__setattr__(native.CPU, "run_each", count)
    try:
        with torch.no_grad():
            split(*routed(4, torch.float32))
    finally:
        object.__setattr__(native.CPU, "run_each", usual)
    assert len(calls) == 3
    assert all(sum(sizes) == 12 for sizes in calls)
