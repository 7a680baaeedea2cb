"""Lets a float model in memory compute like the checkpoint of a run.

`installed` puts in place the same modules as loading (checkpoint/hf.py), filled with the run's tensors, and removes
them afterwards. So a sweep evaluates the same model that `load` of the written checkpoint returns, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer, packed_layer
from fracbit.checkpoint.hf import packed_module, tied_copy, tied_to
from fracbit.models.code import decode_for_code
from fracbit.models.install import replace
from fracbit.models.quant_linear import QuantEmbedding


@contextmanager
def installed(
    model: PreTrainedModel, layers: Mapping[str, StoredLayer], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """A context in which `model` computes like the checkpoint with these `layers` and `tensors`.

    Float tensors are cast to the types that the model has. Experts must be split (`models.experts.split_experts`).
    """
    with ExitStack() as restore, torch.no_grad():
        for name, stored in layers.items():
            _install(model, name, stored=stored, tensors=tensors, restore=restore)
        decode_for_code(model)
        packed = {f"{name}.weight" for name in layers}
        for name, tensor in tensors.items():
            if name not in packed:
                _set_float(model, name, tensor, restore)
        yield


def _install(
    model: PreTrainedModel, name: str, stored: StoredLayer, tensors: Mapping[str, Tensor], restore: ExitStack
) -> None:
    float_module = model.get_submodule(name)
    weight = next(float_module.parameters())
    with torch.device(weight.device):
        module = packed_module(float_module, stored)
    module.fill(packed_layer(name, stored, tensors).to(weight.device))
    for other in tied_to(model, name):
        _replace(model, other, tied_copy(model.get_submodule(other), module), restore)
    if isinstance(module, QuantEmbedding):
        module.dtype = weight.dtype
    elif module.bias is not None:
        module.bias = float_module.get_parameter("bias")
    _replace(model, name, module, restore)


def _replace(model: PreTrainedModel, name: str, module: nn.Module, restore: ExitStack) -> None:
    restore.callback(replace, model, name, replace(model, name, module))


def _set_float(model: PreTrainedModel, name: str, tensor: Tensor, restore: ExitStack) -> None:
    """Give a float tensor the run's values where they differ; a tied head that the run stores by itself is untied."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return  # belongs to no module (GPT-2's causal masks)
    held = getattr(module, leaf, None)
    if not isinstance(held, Tensor):
        return
    new = tensor.to(held.device, held.dtype)
    if torch.equal(held, new):
        return
    own = new.clone()
    restore.callback(setattr, module, leaf, held)
    setattr(module, leaf, nn.Parameter(own, requires_grad=False) if isinstance(held, nn.Parameter) else own)
