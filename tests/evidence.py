"""A block at two bits, and what a correction is to mend it with."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.correction import Evidence
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.models.walk import embed, observe
from fracbit.numerics import decode, quantize_tensor
from fracbit.numerics import stats as statistics
from fracbit.records.scheme import Scheme

SCHEME = Scheme("int", 2, 24)


def quantized_block(model: PreTrainedModel, scheme: Scheme = SCHEME) -> tuple[torch.nn.Module, Evidence]:
    """The first block with its linears at 2 bits, and what it is to be tweaked with."""
    family = family_of(model)
    block = blocks(model, family)[0][1]
    ids = torch.randint(3, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0))
    hidden = embed(model, family, ids, 4)
    held: dict[str, statistics.Stats] = {}

    def add(name: str, x: torch.Tensor) -> None:
        held[name] = statistics.add_inputs(held.get(name) or statistics.empty(x.shape[1]), x)

    order = groups(block, family)
    exits = observe(block, hidden, [group[0] for group in order], add)
    names = [name for group in order for name in group]
    weights = {name: weight_of(block.get_submodule(name)).clone() for name in names}
    block = copy.deepcopy(block)
    packed = {name: quantize_tensor(weight, scheme) for name, weight in weights.items()}
    for name, tensor in packed.items():
        set_weight(block.get_submodule(name), decode(tensor))
    return block, Evidence(
        hidden,
        exits.states,
        train=[0, 1, 2],
        judge=[3],
        weights=weights,
        packed=packed,
        stats=held,
        depth=0.5,
    )
