"""The definition of the packed product: decode the weight, multiply in fp32, round once to the type of the activations.

Every other kernel is tested against this file. It also runs where no other kernel does: slow, but right.
Equation: y = x W^T with W = decode(packed), see `fracbit.numerics.packed`.
"""

import torch
from torch import Tensor

from fracbit.kernels.kernel import Activations, Kernel, check_activations
from fracbit.numerics.packed import PackedTensor, decode
from fracbit.records.scheme import Scheme


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """`x` [..., in] times the transpose of the packed weight: [..., out], in the type of `x`."""
    return (x.float() @ decode(packed).T).to(x.dtype)  # [..., out]


def _prepare(packed: PackedTensor, activations: Activations) -> PackedTensor:
    check_activations(activations)
    return packed


def _supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> bool:
    return True


REFERENCE = Kernel(
    name="reference",
    supports=_supports,
    prepare=_prepare,
    run=lambda packed, x: linear(x, packed),
    explain=lambda: "torch: decodes the whole weight at every call, always in fp32; any scheme, any device",
)
