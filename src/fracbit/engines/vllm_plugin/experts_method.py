"""Mixtures of experts in vLLM: the tokens of one expert after another go through its packed linears.

vLLM's own kernels want the experts stacked, which needs one scheme for all. Here every expert keeps what it is stored as. On a
GPU the loop over experts asks for the router's choice on the host, so that graphs cannot be captured: --enforce-eager there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from fracbit.checkpoint.format import StoredLayer
from fracbit.engines.vllm_plugin.arrivals import Arrivals, expect, forget
from fracbit.engines.vllm_plugin.fused import FusedLayer, Product, fused_layer, product_of
from fracbit.engines.vllm_plugin.linear_method import refuse_parallel
from fracbit.errors import KernelError

GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""What is done to the gate, which then multiplies up, by vLLM's names."""


class FracbitExpertsMethod(FusedMoEMethodBase):
    """The quantization method of the experts `<prefix>.<n>` of one block; `layers` are those of the checkpoint."""

    def __init__(self, moe: Any, prefix: str, layers: Mapping[str, StoredLayer]) -> None:
        super().__init__(moe)
        self.prefix, self.layers = prefix, layers
        self.arrivals: dict[str, Arrivals] = {}
        self.products: dict[str, list[Product]] = {}

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Make room for the stored tensors. Raises `KernelError` for what is not computed, `FormatError` for wrong shapes."""
        check_mixture(layer, self.prefix)
        width = intermediate_size_per_partition
        gate, down, up = layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name
        places = [f"{self.prefix}.{number}" for number in range(num_experts)]
        self.layouts = {
            "w13_": [
                fused_layer((f"{place}.{gate}", f"{place}.{up}"), self.layers, (width, width), hidden_size)
                for place in places
            ],
            "w2_": [
                fused_layer((f"{place}.{down}",), self.layers, (hidden_size,), width) for place in places
            ],
        }
        for name, layouts in self.layouts.items():
            pieces = tuple(piece for layout in layouts for piece in layout.pieces)
            self.arrivals[name] = expect(layer, pieces, params_dtype, where=_finder(layouts), before=name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the products of what arrived. Raises `FormatError` when a tensor is missing."""
        for name, arrivals in self.arrivals.items():
            self.products[name] = [
                product_of(layout.pieces, arrivals.tensors) for layout in self.layouts[name]
            ]
            forget(layer, arrivals, before=name)
        self.arrivals = {}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM runs."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """`x` [tokens, hidden] through the experts `topk_ids` [tokens, k] with `topk_weights` [tokens, k]: [tokens, hidden]."""
        total = torch.zeros_like(x, dtype=torch.float32)  # [tokens, hidden]
        act = GATED[layer.activation.value]
        for expert in topk_ids.unique().tolist():
            tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)  # [n], [n]
            gate, up = self.products["w13_"][expert](x[tokens]).chunk(2, -1)  # [n, width], [n, width]
            found = self.products["w2_"][expert](act(gate) * up)  # [n, hidden]
            total.index_add_(0, tokens, found.float() * topk_weights[tokens, choice, None].float())
        return total.to(x.dtype)


def check_mixture(layer: Any, prefix: str) -> None:
    """Raises `KernelError` for a mixture that is computed in another way than `FracbitExpertsMethod.apply` does."""
    parallel = layer.moe_config.moe_parallel_config
    refuse_parallel(max(parallel.tp_size, parallel.ep_size), [prefix])
    limits = layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
    plain = limits == (None, None, None) and not layer.apply_router_weight_on_input
    if layer.activation.value not in GATED or not plain:
        raise KernelError(
            f"{prefix}: this mixture needs the activation {layer.activation.value} with limits {limits}, and the plug-in has "
            f"{', '.join(GATED)} without limits; run the checkpoint with `fracbit generate` or transformers"
        )


def _finder(layouts: list[FusedLayer]) -> Callable[..., Any]:
    """The piece that vLLM means by the number of an expert and `w1`, `w2` or `w3`."""

    def find(*, shard_id: str, expert_id: int, **others: Any) -> Any:
        return layouts[expert_id].piece(1 if shard_id == "w3" else 0)

    return find
