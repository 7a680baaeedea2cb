"""`fracbit::linear` as PyTorch sees it: schema, fake, autograd, compilation; and the cache of prepared weights behind it."""

import gc

import pytest
import torch
from torch import nn

from fracbit.errors import FormatError, KernelError
from fracbit.kernels import PackedLinear, linear_op, op, reference, spec_of
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead
from fracbit.numerics import PackedTensor, decode, parts_of, quantize_tensor
from fracbit.records.scheme import Scheme


def weight_of(scheme: Scheme, shape: tuple[int, int] = (48, 96)) -> PackedTensor:
    return quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(3)), scheme)


def arguments(weight: PackedTensor, x: torch.Tensor, activations: str = "float") -> tuple[object, ...]:
    return (
        x,
        list(dict(parts_of(weight)).values()),
        spec_of(weight.scheme, weight.shape, dict(parts_of(weight))),
        activations,
    )


SCHEMES = [
    Scheme("nf", 4, 32),
    Scheme("int", 3, 16, "out", "zero"),
    Scheme("kmeans:row", 2, "row", scale="int8:256"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    ("shape", "activations", "grad"),
    [
        ((2, 3, 96), "float", False),
        ((2, 3, 96), "float", True),
        ((0, 96), "float", False),
        ((96,), "int8", False),
    ],
    ids=str,
)
def test_opcheck(scheme: Scheme, shape: tuple[int, ...], activations: str, grad: bool) -> None:
    x = torch.randn(shape, requires_grad=grad)
    torch.library.opcheck(linear_op, arguments(weight_of(scheme), x, activations))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradient_is_that_of_the_decoded_weight(scheme: Scheme) -> None:
    weight = weight_of(scheme)
    x = torch.randn(5, 96, requires_grad=True)
    y = PackedLinear(weight)(x)
    y.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    (twin @ decode(weight).T).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_compiled_graph_holds_the_operator() -> None:
    weight = weight_of(SCHEMES[0])
    linear = PackedLinear(weight)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: linear(x).relu(), backend=backend, fullgraph=True)
    x = torch.randn(4, 96)
    torch.testing.assert_close(compiled(x), reference.linear(x, weight).relu(), rtol=1e-4, atol=1e-4)
    assert "fracbit.linear" in graphs[0].code


def test_a_weight_is_prepared_once_and_forgotten_with_its_codes() -> None:
    weight = weight_of(SCHEMES[0])
    x = torch.randn(1, 96)
    before = len(op._prepared)
    for _ in range(3):
        linear_op(*arguments(weight, x))
    assert len(op._prepared) == before + 1
    del weight
    gc.collect()
    assert len(op._prepared) == before


def test_writing_to_a_part_prepares_again() -> None:
    weight = weight_of(Scheme("kmeans", 4, 32))
    x = torch.randn(1, 96)
    linear_op(*arguments(weight, x))
    assert weight.table is not None
    weight.table.mul_(2)
    torch.testing.assert_close(
        linear_op(*arguments(weight, x)), reference.linear(x, weight), rtol=1e-4, atol=1e-4
    )


def test_spec_and_parts_are_the_whole_weight() -> None:
    weight = weight_of(SCHEMES[2])
    parts = dict(parts_of(weight))
    again = op.packed_of(list(parts.values()), spec_of(weight.scheme, weight.shape, parts))
    assert torch.equal(decode(again), decode(weight))


def test_wrong_arguments_are_refused() -> None:
    weight = weight_of(SCHEMES[0])
    x, parts, spec, _ = arguments(weight, torch.randn(1, 96))
    with pytest.raises(KernelError, match="unknown"):
        linear_op(x, parts, spec, "fast")
    with pytest.raises(FormatError):
        linear_op(x, [parts[0][:, :-1].contiguous(), *parts[1:]], spec, "float")
    with pytest.raises(KernelError, match="96 input channels"):
        linear_op(torch.randn(1, 95), parts, spec, "float")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_that_never_ran_compile_whole(scheme: Scheme) -> None:
    """A graph needs nothing that a first call prepares: linears, an embedding, and the head that shares its bytes."""
    embedding = QuantEmbedding(scheme, (48, 96), torch.float32)
    embedding.fill(weight_of(scheme))
    square = QuantLinear(scheme, (96, 96))
    square.fill(weight_of(scheme, (96, 96)))
    model = nn.Sequential(embedding, square, TiedHead(embedding))
    ids = torch.tensor([[3, 0, 47]])
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
    torch.testing.assert_close(whole, model(ids), rtol=1e-5, atol=1e-5)
