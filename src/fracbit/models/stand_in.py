"""A model of any size that runs a few tokens: a copy of its skeleton with random values, in the memory of one block."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.models.blocks import SENSES, is_table
from fracbit.models.experts import SplitExperts
from fracbit.models.install import replace

DISTINCT = 2  # experts that are made


def runnable(skeleton: PreTrainedModel, stack: str) -> PreTrainedModel:
    """A copy of a skeleton with random values outside its blocks, which lie at `stack`, as far as text goes through it.

    Tables of embeddings give random rows, and two experts stand for all of a block, so that nothing large is made.
    """
    model, inside = deepcopy(skeleton), f"{stack}."
    for path, module in list(model.named_modules()):
        if is_table(module) and not path.startswith(inside):
            replace(model, path, RandomRows(int(module.embedding_dim)))
        if isinstance(module, SplitExperts):
            for number in range(DISTINCT, len(module)):
                module.add_module(str(number), module[number % DISTINCT])
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is not head and not path.startswith(inside) and not SENSES.search(path):
            fill(module, torch.Generator().manual_seed(0))
    return model


class RandomRows(nn.Module):
    """Random rows instead of those of a table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.embedding_dim = width, width
        self.weight = nn.Parameter(
            torch.ones(1, width), requires_grad=False
        )  # code reads its type and device

    def forward(self, ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[..., width] for ids [...]; tables of positions are called with more."""
        return torch.randn(*ids.shape, self.width, generator=torch.Generator().manual_seed(1))


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random values for the module's own tensors on the meta device: matrices small, vectors about 1."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if not tensor.is_meta:
            continue
        made = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            made = torch.randn(tensor.shape, generator=generator)
            made = 1 + 0.1 * made if tensor.dim() < 2 else made * tensor.shape[-1] ** -0.5
        held = nn.Parameter(made, requires_grad=False) if name in module._parameters else made
        setattr(module, name, held)
