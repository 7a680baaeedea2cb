"""Rounding activations: what a quantized linear with `Inputs` sees, and the integer product where both sides have 8 bits.

With scope `token` the scale is the largest magnitude of the token, with `128` of 128 of its inputs; with `tensor` calibration
has found one for all.
Uniform types are those of SmoothQuant (arXiv:2211.10438); `power` rounds the cube root, as arXiv:2403.06408 does for
activations with heavy tails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.errors import SchemeError
from fracbit.numerics.bits import unpack_bits
from fracbit.numerics.datatypes import DataType, fixed_type
from fracbit.numerics.packed import PackedTensor
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme

TOP = 127  # of a symmetric 8-bit integer


def input_type(inputs: Inputs) -> DataType:
    """The table that activations are rounded to. Raises `SchemeError` for fitted types."""
    return fixed_type(Scheme(inputs.dtype, inputs.bits, "row"))


def input_scale(inputs: Inputs, x: Tensor) -> Tensor:
    """The scales of `x` [..., in]: [..., 1] per token, [..., in] where groups of a token have their own, a scalar per tensor.

    The largest magnitude comes to lie on the end of the table. Raises `SchemeError` without calibration.
    """
    end = abs(input_type(inputs).far)
    if inputs.group:
        groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % inputs.group)).unflatten(
            -1, (-1, inputs.group)
        )
        largest = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)  # [..., in], filled up
        scale: Tensor = largest[..., : x.shape[-1]] / end  # [..., in]
        return scale
    if inputs.scope == "token":
        return x.abs().amax(-1, keepdim=True) / end  # [..., 1]
    if inputs.scale is None:
        raise SchemeError(
            "activations with scope tensor need calibration to find their scale; without data, use scope token"
        )
    return torch.tensor(inputs.scale / end, dtype=x.dtype, device=x.device)


def round_inputs(x: Tensor, inputs: Inputs) -> Tensor:
    """`x` [..., in] rounded, in the type of `x`; what lies beyond a static scale is clipped."""
    codes, scale = input_codes(x, inputs)
    values = input_type(inputs).to(x.device).look_up(codes.reshape(1, -1))  # [1, tokens * in]
    return (values.view(x.shape) * scale).to(x.dtype)


def input_codes(x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Codes uint8 of `x` [..., in] in `input_type(inputs)`, and the scales, fp32, that their values are multiplied by."""
    values = x.float()  # [..., in]
    scale = input_scale(inputs, values)
    unit = (values * torch.where(scale > 0, 1 / scale, 0.0)).clamp(-1, 1)  # [..., in]
    return input_type(inputs).to(x.device).nearest(unit.reshape(1, -1)).view(x.shape), scale


def round_through(x: Tensor, inputs: Inputs) -> Tensor:
    """`round_inputs`, through which gradients pass as if it were not there (straight-through, arXiv:1308.3432)."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return round_inputs(x, inputs)
    return x + (round_inputs(x.detach(), inputs) - x.detach())


def is_int8(packed: PackedTensor, inputs: Inputs) -> bool:
    """Whether the product can be taken in integers: symmetric integers with a scale per output row, int8 activations."""
    scheme = packed.scheme
    plain = scheme.dtype == "int" and scheme.bits >= 2 and scheme.offset == "none" and scheme.axis == "in"
    alone = scheme.block == "row" and isinstance(scheme.scale, str) and packed.columns is None
    return plain and alone and inputs.dtype == "int" and inputs.bits == 8 and not inputs.group


def int8_pays(packed: PackedTensor, rows: int) -> bool:
    """Whether the integer product is faster: for few rows the packed product reads less, and it need not unpack codes first."""
    return rows >= (8 if packed.scheme.bits == 8 else 64)


def int8_product(x: Tensor, packed: PackedTensor, inputs: Inputs) -> Tensor:
    """`round_inputs(x) W^T` with `W` [out, in] as in `is_int8`, multiplied in int8 and summed exactly in int32."""
    codes, scale = input_codes(x.reshape(-1, x.shape[-1]), inputs)  # [tokens, in], [tokens, 1] or a scalar
    right, top = int8_weight(packed)  # [out, in]
    assert isinstance(packed.scales, Tensor)
    sums = int_matmul((codes - TOP).view(torch.int8), right.T)  # [tokens, out]
    result = sums.float() * (scale / TOP) * (packed.scales.float().T / top)  # [tokens, out]
    return result.to(x.dtype).view(*x.shape[:-1], packed.shape[0])  # [..., out]


def int8_weight(packed: PackedTensor) -> tuple[Tensor, int]:
    """The codes of a weight as in `is_int8`, as int8 [out, in] about zero, and the largest of them."""
    bits, top = packed.scheme.bits, 2 ** (packed.scheme.bits - 1) - 1
    codes = unpack_bits(packed.codes, bits, packed.shape[1])  # [out, in]
    return (codes - top).view(torch.int8), top  # uint8 wraps around, so that int8 reads what is below zero


def int_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left` [m, k] times `right` [k, n], int8, exact in int32 [m, n]; padded to what torch takes on the device."""
    rows, columns = len(left), right.shape[1]
    if left.device.type == "cpu":
        return torch._int_mm(left, right)
    return torch._int_mm(*padded(left, right))[:rows, :columns]


def padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros around two int8 matrices until CUDA multiplies them: more than 16 rows, other sides divisible by 8."""
    rows, inner, columns = len(left), left.shape[1], right.shape[1]
    pad = torch.nn.functional.pad
    wide = pad(left, (0, -inner % 8, 0, max(0, 17 - rows)))  # [rows, inner], both padded
    tall = pad(
        right.T, (0, -inner % 8, 0, -columns % 8)
    ).T  # [inner, columns], padded; column-major, as it is read
    return wide, tall
