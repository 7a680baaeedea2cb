"""Rounding activations: step size, clipping, zero tokens, the integer product equal to the simulated one."""

import pytest
import torch

from fracbit.errors import SchemeError
from fracbit.numerics import decode, quantize_tensor
from fracbit.numerics.activations import (
    int8_product,
    int8_weight,
    is_int8,
    padded,
    round_inputs,
    round_through,
)
from fracbit.records.inputs import Inputs, parse_inputs
from fracbit.records.scheme import Scheme


def activations(seed: int = 0) -> torch.Tensor:
    x = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 0
    return x


def test_labels_are_read_back():
    for text in ("int8/token", "int8/tensor", "power8/token", "int4/token"):
        assert str(parse_inputs(text)) == text
    assert parse_inputs("int8") == Inputs()
    with pytest.raises(SchemeError, match="TYPEBITS"):
        parse_inputs("eight")
    assert Inputs.from_json(Inputs("int", 8, "tensor", 2.5).to_json()).scale == 2.5


@pytest.mark.parametrize("bits", [4, 8])
def test_error_per_token_is_half_a_step(bits: int):
    x = activations()
    error = (round_inputs(x, Inputs(bits=bits)) - x).abs()
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool((error <= step / 2 * 1.0001 + 1e-7).all())
    assert torch.equal(round_inputs(x, Inputs())[0, 0], x[0, 0])


def test_static_scales_clip_and_need_calibration():
    x = activations()
    rounded = round_inputs(x, Inputs(scope="tensor", scale=1.0))
    assert float(rounded.abs().max()) == pytest.approx(1.0)
    with pytest.raises(SchemeError, match="calibration"):
        round_inputs(x, Inputs(scope="tensor"))


def test_gradients_pass_through_the_rounding():
    x = activations().requires_grad_()
    found = round_through(x, Inputs())
    assert torch.allclose(found, round_inputs(x.detach(), Inputs()), atol=1e-6)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(round_through(x.detach(), Inputs()), round_inputs(x.detach(), Inputs()))


def test_power_keeps_small_values_beside_an_outlier():
    x = activations()[1:]
    x[..., 3] = 60
    small = torch.arange(48) != 3
    error = {d: float((round_inputs(x, Inputs(d)) - x)[..., small].square().mean()) for d in ("int", "power")}
    assert error["power"] < 0.25 * error["int"]


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize("inputs", [Inputs(), Inputs(scope="tensor", scale=2.0)])
def test_integer_product_equals_the_simulation(inputs: Inputs, bits: int):
    x, weight = activations(), torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    packed = quantize_tensor(weight, Scheme("int", bits, "row"))
    assert is_int8(packed, inputs)
    expected = round_inputs(x, inputs) @ decode(packed).T
    assert torch.allclose(int8_product(x, packed, inputs), expected, atol=1e-4)
    codes, top = int8_weight(packed)
    assert torch.equal(codes.float() / top * packed.scales.float(), decode(packed))
    assert not is_int8(quantize_tensor(weight, Scheme("int", bits, 16)), inputs)
    assert not is_int8(quantize_tensor(weight, Scheme("int", bits, "row", offset="zero")), inputs)


@pytest.mark.parametrize("shape", [(1, 3, 5), (17, 16, 8), (40, 43, 172)])
def test_padding_leaves_the_product(shape: tuple[int, int, int]):
    rows, inner, columns = shape
    random = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (rows, inner), generator=random, dtype=torch.int8)
    right = torch.randint(-127, 128, (inner, columns), generator=random, dtype=torch.int8)
    wide, tall = padded(left, right)
    assert len(wide) > 16
    assert wide.shape[1] % 8 == tall.shape[1] % 8 == 0
    assert torch.equal(torch._int_mm(wide, tall)[:rows, :columns], left.int() @ right.int())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_gives_the_same_by_integers_and_by_floats(bits: int, monkeypatch: pytest.MonkeyPatch):
    """Many rows go through torch's int8 product, few through the packed kernels: no token may notice which."""
    from fracbit.models import quant_linear

    random = torch.Generator().manual_seed(2)
    packed = quantize_tensor(torch.randn(24, 43, generator=random), Scheme("int", bits, "row"))
    layer = quant_linear.QuantLinear(packed.scheme, packed.shape, inputs=Inputs())
    layer.fill(packed)
    x, used = torch.randn(80, 43, generator=random), []
    real = quant_linear.int8_product
    monkeypatch.setattr(quant_linear, "int8_product", lambda *args: used.append(len(args[0])) or real(*args))
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    assert used == [80]
    assert torch.allclose(together, alone, atol=1e-4)
