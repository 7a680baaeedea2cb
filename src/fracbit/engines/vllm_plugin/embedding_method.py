"""Embedding tables and output heads of vLLM: rows are decoded as they are looked up, and heads multiply by the packed bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from fracbit.checkpoint.format import StoredLayer
from fracbit.engines.vllm_plugin.arrivals import Arrivals, expect, forget
from fracbit.engines.vllm_plugin.fused import FusedPiece, Product, packed_piece, product_of
from fracbit.engines.vllm_plugin.linear_method import refuse_parallel
from fracbit.engines.vllm_plugin.ops import table_rows
from fracbit.errors import FormatError
from fracbit.kernels.op import spec_of
from fracbit.numerics.packed import PackedTensor, parts_of


class FracbitEmbeddingMethod(QuantizeMethodBase):
    """The quantization method of a table [vocabulary, width] called `name` in the checkpoint: embedding, head, or both."""

    def __init__(self, name: str, stored: StoredLayer) -> None:
        self.piece = FusedPiece(name, stored, first=0, rows=stored.shape[0])
        self.arrivals: Arrivals | None = None
        self.packed: PackedTensor | None = None
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
        """Make room for the stored tensors. Raises `KernelError` under tensor parallelism, `FormatError` for a wrong shape."""
        refuse_parallel(layer.tp_size, [self.piece.name])
        wanted, stored = (layer.num_embeddings, input_size), self.piece.stored
        if stored is None or stored.shape != wanted:
            raise FormatError(
                f"{self.piece.name} is stored as {stored and stored.shape}, and vLLM needs {wanted}; "
                "config.json does not belong to this checkpoint, or vLLM adds tokens, for which the table must be float"
            )
        self.dtype = params_dtype
        self.arrivals = expect(layer, (self.piece,), params_dtype, where=lambda *shard: self.piece)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take over the packed table. Raises `FormatError` when a tensor is missing."""
        if self.arrivals is not None:
            self.tensors = dict(self.arrivals.tensors)
            self.packed = packed_piece(self.piece, self.tensors)
            parts = dict(parts_of(self.packed))
            self.parts, self.spec = (
                list(parts.values()),
                spec_of(self.packed.scheme, self.packed.shape, parts),
            )
            forget(layer, self.arrivals)
            self.arrivals = None

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows [..., width] of token `ids` [...]."""
        assert self.packed is not None
        flat = ids.reshape(-1)  # [tokens]
        rows: Tensor = table_rows(flat, self.parts, self.spec)  # [tokens, width]
        return rows.to(self.dtype).view(*ids.shape, -1)  # [..., width]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., padded vocabulary] of hidden states `x` [..., width]; vLLM cuts the padding off."""
        if self.product is None:
            self.product = product_of((self.piece,), self.tensors)
        y = self.product(x)  # [..., vocabulary]
        if short := layer.num_embeddings_padded - y.shape[-1]:
            y = torch.nn.functional.pad(y, (0, short))
        return y if bias is None else y + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A head that has a table of its own stays what it is."""
        return layer


class FracbitTiedHeadMethod(QuantizeMethodBase):
    """The quantization method of a head that multiplies by the packed embedding table, whose bytes it does not hold."""

    def __init__(self) -> None:
        self.table: tuple[Any, ...] = ()

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Nothing: the bytes belong to the embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Note the embedding, in a tuple that hides it from the tree of modules."""
        self.table = (embed_tokens,)
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits as `FracbitEmbeddingMethod.apply` gives them. Raises `FormatError` where vLLM did not tie the head."""
        if not self.table:
            raise FormatError(
                f"the output head {layer.prefix} is a quantized embedding by config.json, and vLLM does not tie it; "
                "quantize again with a scheme for the head, or leave the embedding float"
            )
        (table,) = self.table
        logits: Tensor = table.quant_method.apply(table, x, bias)
        return logits
