"""A model without its weights: the modules of any config on the meta device, so that a 176B model costs no memory.

The streaming loop asks it which layers there are and how large (`quantizable`); origins.py says where its tensors lie on disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fracbit.errors import SourceError, blamed_on
from fracbit.models.blocks import blocks, groups, is_transposed, shape_of
from fracbit.models.classes import auto_class, from_config
from fracbit.models.experts import split_experts
from fracbit.models.family import Family
from fracbit.models.find import family_of, tower_linears

LayerKind: TypeAlias = Literal["linear", "embedding", "head", "tower"]
"""What a layer is: a linear of the blocks that read text, a table, the output head, a linear of a tower's blocks."""


@dataclass(frozen=True)
class Layer:
    """A weight that can be quantized. `out` and `width` are the rows and columns of the `[out, in]` view.

    `block` is the number of the block, None outside the blocks; `group` the first of the linears that read
    the same input; `tied` the layer that owns the tensor where it is shared.
    """

    name: str
    out: int
    width: int
    transposed: bool
    block: int | None
    kind: LayerKind
    group: str
    tied: str | None = None


def skeleton(
    config: PreTrainedConfig, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The language model of a config on the meta device, in eval mode, its mixtures of experts split into linears.

    Buffers that no checkpoint holds (rotary frequencies) are computed, on the CPU. `attention` is
    transformers' `attn_implementation`. Raises SourceError when the config is not one of a language model.
    """
    auto = auto_class(config)
    how: dict[str, Any] = {
        "attn_implementation": attention, "trust_remote_code": trust_remote_code, "dtype": torch.float32
    }  # fmt: skip
    with blamed_on(
        f"{auto.__name__} cannot build a model from this config of type {config.model_type!r}", SourceError
    ):
        with torch.device("meta"):
            model = from_config(auto, config, **how)
        split_experts(model)
        _compute_buffers(model)
        _build_buffers(model, lambda: from_config(auto, config, **how))
    model.train(False)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Fill unsaved buffers through the model's own `_init_weights`; those it does not know stay on the meta
    device, and `walk.embed` names them. The weights are on the meta device, so their initialization does
    nothing.
    """
    owner: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        parent = owner.get(path.rpartition(".")[0], model)
        owner[path] = module if isinstance(module, PreTrainedModel) else parent
        unsaved = [
            name
            for name, _ in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]
        if unsaved:
            _fill(owner[path], module, unsaved)


def _build_buffers(model: PreTrainedModel, build: Callable[[], PreTrainedModel]) -> None:
    """Fill unsaved buffers that are still on the meta device, such as Falcon-H1's factors, from a model that `build` makes.

    Its parameters go to the meta device as soon as they are made, so no more than one is in memory, and none is initialized.
    """
    saved = model.state_dict().keys()
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if not left:
        return
    register = nn.Module.register_parameter

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        held = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, held)

    with patch.object(nn.Module, "register_parameter", to_meta), no_init_weights():
        built = build()
    found = dict(built.named_buffers())
    for name in left:
        path, _, leaf = name.rpartition(".")
        if name in found and not found[name].is_meta:
            setattr(model.get_submodule(path), leaf, found[name])


def _fill(owner: PreTrainedModel, module: nn.Module, names: list[str]) -> None:
    """Initialize twice over different contents: a buffer that ends up the same both times was really written."""
    shapes = {name: module.get_buffer(name) for name in names}
    results = []
    for content in (0, 1):
        for name, shape in shapes.items():
            setattr(module, name, torch.full_like(shape, content, device="cpu"))
        with torch.no_grad():
            owner._init_weights(module)
        results.append({name: module.get_buffer(name) for name in names})
    for name in names:
        if not torch.equal(results[0][name], results[1][name]):
            setattr(module, name, shapes[name])


def quantizable(
    model: PreTrainedModel,
    family: Family | None = None,
    include_head: bool = False,
    include_embeddings: bool = False,
) -> dict[str, Layer]:
    """The layers that can be quantized, by full name (without `.weight`), in the order in which a forward
    uses them.

    `model` may be a skeleton. A head that is the embedding table's tensor has the table's name as `tied`.
    """
    family = family or family_of(model)
    table = family.embeddings[0] if family.embeddings else ""
    found: list[Layer] = []
    if include_embeddings:
        found += [_layer(model, name, "embedding", group=name) for name in token_tables(family)]
    for index, (path, block) in enumerate(blocks(model, family)):
        for group in groups(block, family):
            first = f"{path}.{group[0]}"
            found += [_layer(model, f"{path}.{name}", "linear", group=first, block=index) for name in group]
    if include_head and family.head:
        tied = _tied(model, family.head, table)
        found.append(_layer(model, family.head, "head", group=family.head, tied=tied))
    return {layer.name: layer for layer in found}


def towers(model: PreTrainedModel, family: Family) -> dict[str, Layer]:
    """The linears of towers for images and sound that can be quantized, by full name."""
    owners = {name: owner.removesuffix(".weight") for name, owner in model.all_tied_weights_keys.items()}
    names = [name for name in tower_linears(model, family) if f"{name}.weight" not in owners]
    return {name: _layer(model, name, "tower", group=name) for name in names}


def token_tables(family: Family) -> list[str]:
    """The tables that are looked up by token ids: the first, and those that Gemma 3n and 4 have for every block."""
    first, *others = family.embeddings or ("",)
    return [name for name in (first, *(name for name in others if name.endswith("per_layer"))) if name]


def _layer(
    model: nn.Module,
    name: str,
    kind: LayerKind,
    *,
    group: str,
    block: int | None = None,
    tied: str | None = None,
) -> Layer:
    module = model.get_submodule(name)
    out, width = shape_of(module)
    transposed = is_transposed(module)
    return Layer(name, out, width, transposed, block=block, kind=kind, group=group, tied=tied)


def _tied(model: nn.Module, head: str, table: str) -> str | None:
    """The table's name when the head has the very same parameter."""
    shared = bool(table) and model.get_submodule(head).weight is model.get_submodule(table).weight
    return table if shared else None
