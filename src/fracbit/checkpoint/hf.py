"""The bridge to transformers: `import fracbit` registers it, and `from_pretrained` then reads fracbit checkpoints.

The quantizer replaces modules of the empty skeleton; then transformers loads tensors by name into their buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
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
from fracbit.checkpoint.format import QUANT_METHOD, SIXTEEN, StoredLayer, read_layers
from fracbit.checkpoint.source import read_headers
from fracbit.errors import FormatError
from fracbit.models.blocks import SENSES, find, is_table
from fracbit.models.code import decode_for_code
from fracbit.models.experts import split_experts
from fracbit.models.install import replace
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedCopy, TiedHead

if TYPE_CHECKING:  # transformers' modeling_utils may still be loading when this module is imported
    from transformers import PreTrainedModel

_BLOCK = re.compile(r".*?\.\d+(?=\.)")


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
        self.loading: PreTrainedModel | None = None
        if not self.pre_quantized:
            raise FormatError(
                "transformers cannot quantize with fracbit while loading; run `fracbit quantize` first"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.loading = model
        split_experts(model)
        for name, place in places(model, self.stored).items():
            swap(model, place, self.stored[name])
            _leave_to_the_files(model, place)
        files = [
            Path(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")
        ]
        if files:
            name, tensors = str(files[0].parent), read_headers(files)
            check_listed(name, listed_tensors(files[0].parent), tensors)
            check_headers(name, self.stored, tensors)
        when_loaded(model, lambda missing: check_missing(_name_of(model), missing, FormatError))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.loading = None
        check_packed(_name_of(model), model)
        decode_for_code(model)
        own: Any = model
        own.resize_token_embeddings = MethodType(_resize_token_embeddings, model)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """None for the class that was quantized, which has the names of the files; another class renames as it does floats.

        Older versions of transformers (5.19) give no model: then it is the one that is being loaded.
        """
        whole: Any = super().update_weight_conversions
        model = self.loading if model is None else model
        assert model is not None
        given = {"model": model} if "model" in signature(whole).parameters else {}
        rules = whole(weight_conversions, **given)
        return [] if _is_own(model, self.stored) else _renamings(model, self.stored, rules)

    def is_serializable(self) -> bool:
        """Packed buffers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients pass through packed linears, whose codes have none."""
        return True


def places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Where the layers called `names` in a checkpoint lie in `model`, which may be another class than was quantized.

    A text model that is loaded from the checkpoint of a model for images leaves the other's towers out, and a model without a
    head (`AutoModel`) the head.
    """
    found = _named_places(model, list(names))
    if model.get_output_embeddings() is not None:
        return found
    return {
        name: place for name, place in found.items() if _BLOCK.match(name) or find(model, place) is not None
    }


def _named_places(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    if _is_own(model, names):
        return {name: name for name in names}
    names = _without_towers(model, names)
    if _is_own(model, names):
        return {name: name for name in names}
    state, left_out = model.state_dict(), model._keys_to_ignore_on_load_unexpected or []
    renamings = _renamings(model, names)
    found = {
        name: rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, state)[0]
        for name in names
        if not any(re.search(pattern, f"{name}.weight") for pattern in left_out)
    }
    return {name: place.removesuffix(".weight") for name, place in found.items()}


def _without_towers(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The names without those in towers for images or sound, where `model` has no tower."""
    if any(SENSES.search(name) for name, _ in model.named_modules()):
        return names
    return [name for name in names if not SENSES.search(name)] or names


def _renamings(
    model: PreTrainedModel, names: Iterable[str], rules: Iterable[Any] | None = None
) -> list[WeightRenaming]:
    """How a class that was not quantized calls the tensors of a checkpoint with layers called `names`.

    By transformers' rules where they lead to its blocks, else by the path of its own blocks: files of fracbit have the names of
    the class that was quantized, for which transformers has no rules to another class.
    """
    rules = get_model_conversion_mapping(model) if rules is None else rules
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    first = sorted(names, key=lambda name: SENSES.search(name) is not None)  # blocks that read text
    block = next((match[0] for match in map(_BLOCK.match, first) if match), "")
    state = {name: True for name, _ in model.named_modules()}
    there = rename_source_key(block, renamings, [], model.base_model_prefix, state)[0]
    stack, _, number = block.rpartition(".")
    same = [
        name.removesuffix(f".{number}")
        for name in state
        if name.endswith(f".{stack.rpartition('.')[2]}.{number}")
    ]
    if there in state or len(same) != 1:
        return renamings
    old, new = stack.split("."), same[0].split(".")
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return [WeightRenaming("^" + re.escape(".".join([*old, ""])), ".".join([*new, ""]) if new else "")]


def _is_own(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether `model` has the blocks in which the layers called `names` lie."""
    names = list(names)
    blocks = {match[0] for match in map(_BLOCK.match, names) if match}
    return all(find(model, place) is not None for place in blocks or names)


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
    for other in tied_to(model, name):
        model.all_tied_weights_keys.pop(f"{other}.weight")
        replace(model, other, tied_copy(model.get_submodule(other), packed))


def _leave_to_the_files(model: PreTrainedModel, name: str) -> None:
    """Keep transformers from initializing what holds a packed module, by the shape of its weight: all of it is in the files.

    A module with buffers that no file holds must still be initialized.
    """
    while name := name.rpartition(".")[0]:
        module: Any = model.get_submodule(name)
        if _is_model(module) or module._non_persistent_buffers_set:
            return
        module._is_hf_initialized = True


def _is_model(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix")


def tied_copy(module: nn.Module, owner: QuantLinear | QuantEmbedding) -> nn.Module:
    """What stands in for a float `module` that shares its weight with the one that `owner` replaces."""
    if isinstance(owner, QuantEmbedding) and not is_table(module):
        return TiedHead(owner)
    return TiedCopy(owner)


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


def _resize_token_embeddings(
    model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> nn.Module:
    """`resize_token_embeddings` of a packed model. Raises `FormatError` where a table or head that would change is packed."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = isinstance(table, QuantEmbedding) or isinstance(head, QuantLinear | TiedHead)
    same = new_num_tokens in (None, getattr(table, "num_embeddings", None))
    if not packed or (same and not args and not kwargs.get("pad_to_multiple_of")):
        kind: Any = type(model)
        return table if packed else kind.resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
    raise FormatError(
        f"{_name_of(model)} holds its token table or its head packed, and packed rows cannot be added or removed; resize the "
        "float model and quantize that, or leave `embeddings` and `head` out of the recipe: float tables can be resized"
    )


def _name_of(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def tied_to(model: PreTrainedModel, name: str) -> list[str]:
    """The modules that share the weight of the module `name`: a head, or linears of blocks that repeat (Zamba)."""
    pairs = model.all_tied_weights_keys.items()
    return [other.removesuffix(".weight") for other, owner in pairs if owner == f"{name}.weight"]


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def register() -> None:
    """Register fracbit with transformers; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(FracbitConfig)
        register_quantizer(QUANT_METHOD)(FracbitQuantizer)


register()
