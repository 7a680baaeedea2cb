"""The bridge to transformers: `import fracbit` registers it, and `from_pretrained` then reads fracbit checkpoints.

The quantizer replaces modules of the empty skeleton; then transformers loads tensors by name into their buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fracbit.checkpoint.complete import (
    check_headers,
    check_listed,
    check_missing,
    check_packed,
    listed_tensors,
    when_loaded,
)
from fracbit.checkpoint.format import QUANT_METHOD, StoredLayer, read_layers
from fracbit.checkpoint.source import read_headers
from fracbit.errors import FormatError
from fracbit.models.experts import split_experts, without_fusing
from fracbit.models.install import replace
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead

if TYPE_CHECKING:  # transformers' modeling_utils may still be loading when this module is imported
    from transformers import PreTrainedModel

SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FracbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a fracbit checkpoint, held as it was read, so that it is saved unchanged."""

    def __init__(self, **config: Any) -> None:
        config["quant_method"] = QUANT_METHOD
        self.__dict__.update(config)
        self.stored = read_layers(config)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json."""
        return {name: value for name, value in self.__dict__.items() if name != "stored"}


class FracbitQuantizer(HfQuantizer):
    """Replaces linears and embeddings by packed ones before the weights are loaded."""

    def __init__(self, quantization_config: FracbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored = quantization_config.stored
        if not self.pre_quantized:
            raise FormatError(
                "transformers cannot quantize with fracbit while loading; run `fracbit quantize` first"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        split_experts(model)
        for name, stored in self.stored.items():
            swap(model, name, stored)
        files = [
            Path(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")
        ]
        if files:
            name, tensors = str(files[0].parent), read_headers(files)
            check_listed(name, listed_tensors(files[0].parent), tensors)
            check_headers(name, self.stored, tensors)
        when_loaded(model, lambda missing: check_missing(_name_of(model), missing, FormatError))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_packed(_name_of(model), model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Fuse no experts: a fracbit checkpoint names each one by itself, as the split model does."""
        rules = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        return without_fusing(rules)

    def is_serializable(self) -> bool:
        """Packed buffers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def swap(model: PreTrainedModel, name: str, stored: StoredLayer) -> None:
    """Replace the module `name` of `model` by one that holds `stored`. Raises `FormatError` when it is not there."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"{type(model).__name__} has no layer {name!r}: wrong model class for this checkpoint"
        ) from None
    with torch.device(_device_of(module)):
        packed = packed_module(module, stored)
    replace(model, name, packed)
    if isinstance(packed, QuantEmbedding):
        for head in tied_heads(model, name):
            model.all_tied_weights_keys.pop(f"{head}.weight")
            replace(model, head, TiedHead(packed))


def packed_module(module: nn.Module, stored: StoredLayer) -> QuantLinear | QuantEmbedding:
    """The module that holds `stored` in place of the float `module`; its buffers are still empty."""
    if stored.kind == "embedding":
        factor = float(getattr(module, "scalar_embed_scale", 1.0))
        return QuantEmbedding(stored.scheme, stored.shape, torch.get_default_dtype(), factor)
    return QuantLinear(
        stored.scheme,
        stored.shape,
        bias=getattr(module, "bias", None) is not None,
        outliers=stored.outliers,
        sixteen=SIXTEEN[stored.outlier_dtype],
        inputs=stored.inputs,
        rotated=stored.rotated,
    )


def _name_of(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def tied_heads(model: PreTrainedModel, name: str) -> list[str]:
    """The modules that share the weight of the embedding table `name`."""
    pairs = model.all_tied_weights_keys.items()
    return [head.removesuffix(".weight") for head, table in pairs if table == f"{name}.weight"]


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def register() -> None:
    """Register fracbit with transformers; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(FracbitConfig)
        register_quantizer(QUANT_METHOD)(FracbitQuantizer)


register()
