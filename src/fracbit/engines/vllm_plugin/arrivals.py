"""Where stored tensors arrive while vLLM loads: an empty parameter for every name, whose loader keeps what comes under it.

vLLM asks the parameter of a fused layer to load, and says which shard the tensor is. Its own loaders would copy shards into one
matrix; this one keeps them as they are stored, under the names that they have in the file, until all are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from fracbit.engines.vllm_plugin.fused import FusedPiece, leaves_of

Where = Callable[..., FusedPiece]
"""The piece that a tensor belongs to, from what vLLM passes besides the tensor."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The tensors of some pieces of a layer by their names in the file, as they arrive, on `device`; float ones as `dtype`."""

    pieces: tuple[FusedPiece, ...]
    dtype: torch.dtype
    device: torch.device
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, piece: FusedPiece, leaf: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor: the file that it lies in is closed afterwards."""
        dtype = self.dtype if piece.stored is None else tensor.dtype
        copied = tensor.detach().to(self.device, dtype, copy=True)
        self.tensors[f"{piece.name}.{leaf}"] = copied.contiguous()


def expect(
    layer: Any, pieces: tuple[FusedPiece, ...], dtype: torch.dtype, where: Where, before: str = ""
) -> Arrivals:
    """Give a layer of vLLM a parameter `before` + name for every tensor that its pieces are stored as.

    The parameters are empty, on the device where vLLM makes parameters now. `forget` removes them.
    """
    arrivals = Arrivals(pieces, dtype, torch.empty(0).device)
    for leaf, stored in leaves_of(pieces, dtype).items():
        parameter = BasevLLMParameter(
            data=torch.empty(0, dtype=stored), weight_loader=_loader(arrivals, leaf, where)
        )
        layer.register_parameter(before + leaf, parameter)
    return arrivals


def forget(layer: Any, arrivals: Arrivals, before: str = "") -> None:
    """Remove what `expect` has given to a layer; the tensors now belong to its product."""
    for leaf in leaves_of(arrivals.pieces, arrivals.dtype):
        delattr(layer, before + leaf)
    arrivals.tensors.clear()


def _loader(arrivals: Arrivals, leaf: str, where: Where) -> Callable[..., bool]:
    def load(param: Any, loaded_weight: Tensor, *shard: Any, **names: Any) -> bool:
        arrivals.keep(where(*shard, **names), leaf, loaded_weight)
        return True

    return load
