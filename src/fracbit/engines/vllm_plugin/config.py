"""`quantization_config` of a fracbit checkpoint as vLLM reads it: which layer of the model gets which method."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from fracbit.checkpoint.format import QUANT_METHOD, StoredLayer, read_layers
from fracbit.engines.vllm_plugin.embedding_method import FracbitEmbeddingMethod, FracbitTiedHeadMethod
from fracbit.engines.vllm_plugin.experts_method import FracbitExpertsMethod
from fracbit.engines.vllm_plugin.fused import piece_names
from fracbit.engines.vllm_plugin.linear_method import FracbitLinearMethod
from fracbit.errors import FormatError

SHOWN = 3  # names in a message


class FracbitQuantization(QuantizationConfig):
    """The layers of a checkpoint by the names that vLLM's model has for them, and whether its head is its embedding.

    `claimed`: those for which vLLM has made a layer.
    """

    def __init__(self, layers: dict[str, StoredLayer]) -> None:
        super().__init__()
        self.layers, self.tied = layers, False
        self.claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FracbitQuantization:
        """From the JSON object of config.json. Raises `FormatError`."""
        return cls(read_layers(config))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA GPUs: that of bfloat16 products in Triton."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note whether the head is tied."""
        text = hf_config.get_text_config() if hf_config is not None else None
        self.tied = bool(
            getattr(text, "tie_word_embeddings", False) or getattr(hf_config, "tie_word_embeddings", False)
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the layers what the model that vLLM builds calls them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of one layer of vLLM, None for what stays as it is. Raises `FormatError` for what cannot be run."""
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix if prefix in self.layers else self._nameless_table(layer, prefix)
            return self._table(name) if name in self.layers else None
        return self._linear(prefix) if isinstance(layer, LinearBase) else None

    def get_checkpoint_weight_mapper(self) -> Any:
        """No renaming; vLLM asks when the model is built, so that it is seen here which layers it has no place for."""
        left = sorted(self.layers.keys() - self.claimed)
        if left and get_current_vllm_config().parallel_config.pipeline_parallel_size == 1:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise FormatError(
                f"vLLM's model has no layer that can hold {', '.join(left[:SHOWN])}{more}, which the checkpoint stores packed; "
                "quantize again with these left float, or run the checkpoint with `fracbit generate` or transformers"
            )
        return super().get_checkpoint_weight_mapper()

    def _linear(self, prefix: str) -> Any:
        names = piece_names(prefix, self.packed_modules_mapping)
        names = (prefix,) if prefix in self.layers else names
        found = {name: self.layers[name] for name in names if name in self.layers}
        self.claimed |= found.keys()
        return FracbitLinearMethod(names, found) if found else UnquantizedLinearMethod()

    def _table(self, name: str) -> FracbitEmbeddingMethod:
        self.claimed.add(name)
        return FracbitEmbeddingMethod(name, self.layers[name])

    def _head(self, prefix: str) -> Any:
        if prefix in self.layers:
            return self._table(prefix)
        packed = any(stored.kind == "embedding" for stored in self.layers.values())
        return FracbitTiedHeadMethod() if self.tied and packed else None

    def _nameless_table(self, layer: Any, prefix: str) -> str:
        """The name of a table that vLLM's model makes without saying its name: the one table of its shape.

        Raises `FormatError` when there are several.
        """
        if prefix:
            return prefix
        shape = (layer.num_embeddings, layer.embedding_dim)
        found = [
            name
            for name, stored in self.layers.items()
            if stored.kind == "embedding" and stored.shape == shape
        ]
        if len(found) > 1:
            raise FormatError(
                f"{' and '.join(found)} are packed tables of one shape, and vLLM's model does not say which it asks for; "
                "quantize again and keep them float"
            )
        return found[0] if found else prefix

    def _experts(self, layer: Any, prefix: str) -> Any:
        names = [name for name in self.layers if name.startswith(f"{prefix}.")]
        self.claimed |= set(names)
        return FracbitExpertsMethod(layer.moe_config, prefix, self.layers) if names else None
