"""Linears of vLLM, fused or not: the pieces of one are multiplied apart, each by fracbit's kernel for its scheme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from fracbit.checkpoint.format import StoredLayer
from fracbit.engines.vllm_plugin.arrivals import Arrivals, expect, forget
from fracbit.engines.vllm_plugin.fused import Product, fused_layer, product_of
from fracbit.errors import KernelError


class FracbitLinearMethod(LinearMethodBase):
    """The quantization method of one linear of vLLM, which is made of the layers `names` of the checkpoint."""

    def __init__(self, names: Sequence[str], layers: dict[str, StoredLayer]) -> None:
        self.names, self.layers = names, layers
        self.arrivals: Arrivals | None = None
        self.product: Product | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Make room for the stored tensors. Raises `KernelError` under tensor parallelism, `FormatError` for wrong shapes."""
        refuse_parallel(layer.tp_size, self.names)
        layout = fused_layer(self.names, self.layers, output_partition_sizes, input_size)
        self.arrivals = expect(layer, layout.pieces, params_dtype, where=layout.piece)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the product of what arrived. Raises `FormatError` when a tensor is missing."""
        if self.arrivals is not None:
            self.product = product_of(self.arrivals.pieces, self.arrivals.tensors)
            forget(layer, self.arrivals)
            self.arrivals = None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., in] -> [..., out]."""
        assert self.product is not None
        y = self.product(x)  # [..., out]
        return y if bias is None else y + bias


def refuse_parallel(size: int, names: Sequence[str]) -> None:
    """Raises `KernelError` when vLLM would cut packed weights into `size` parts."""
    if size > 1:
        raise KernelError(
            f"{', '.join(names)}: vLLM runs with a tensor parallel size of {size}, and packed weights are not cut yet; use "
            "--tensor-parallel-size 1, with --pipeline-parallel-size or --data-parallel-size for several devices"
        )
