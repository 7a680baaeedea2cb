"""The table of kernels. The first one that supports scheme, device and shape runs; the last, the reference, supports all."""

import torch

from fracbit.kernels.cpu import CPU
from fracbit.kernels.gpu import GPU
from fracbit.kernels.kernel import Kernel
from fracbit.kernels.reference import REFERENCE
from fracbit.records.scheme import Scheme

KERNELS: tuple[Kernel, ...] = (CPU, GPU, REFERENCE)


def choose(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> Kernel:
    """The kernel that runs a weight `[out, in]` of `scheme` on `device`."""
    return next(kernel for kernel in KERNELS if kernel.supports(scheme, device, shape))


def kernel_report() -> str:
    """What runs here and what does not, one line a kernel."""
    return "\n".join(f"{kernel.name}: {kernel.explain()}" for kernel in KERNELS)
