"""Rotations in the loop: of the residual stream, folded into the weights, and of what the MLP makes inside, while it runs.

`rotate`: x R instead of x on the residual stream (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, stage 1a): embeddings and
what writes the stream are turned, the norms' gains go into the linears that read them, and these are turned back. Nothing is
left to do at run time. A head that is its embedding table becomes a matrix of its own: the table is turned as it is, the head
with the final norm's gain in it.

`rotate-mlp`: the input of every quantized down projection is multiplied by a Hadamard matrix at run time (stage 1d), whose
inverse is in the stored weight; the checkpoint says so, and `QuantLinear` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.models.blocks import weight_of
from fracbit.models.calls import device_of
from fracbit.models.family import Family
from fracbit.models.fold import check_rotatable, inner_readers, rotate_block, rotate_rest
from fracbit.models.install import materialize, set_weight
from fracbit.transforms import transforms_of, turn_columns, turn_inputs


def rotates(transforms: Sequence[str]) -> bool:
    """Whether any of the `transforms` is a rotation."""
    return any(transform.rotates for transform in transforms_of(transforms))


def needs_untied_head(transforms: Sequence[str]) -> bool:
    """Whether the `transforms` make two matrices of a head and an embedding table that are tied."""
    return any(transform.stream_signs is not None for transform in transforms_of(transforms))


def stream_rotation(
    model: PreTrainedModel, family: Family, transforms: Sequence[str], seed: int
) -> Tensor | None:
    """The signs [width] of the rotation of the residual stream, None where none is asked for.

    Raises `RecipeError` for a model whose stream cannot be rotated.
    """
    drawn = [each.stream_signs for each in transforms_of(transforms) if each.stream_signs is not None]
    if not drawn:
        return None
    check_rotatable(model, family)
    return drawn[0](int(model.config.get_text_config().hidden_size), seed)


def turned_rest(
    model: PreTrainedModel, family: Family, signs: Tensor, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The `tensors` outside the blocks, turned, in the types that they are stored in. The model is filled with them."""
    known = model.state_dict().keys() & tensors.keys()
    materialize(model, {name: tensors[name] for name in known}, torch.float32, partial=True)
    rotate_rest(model, family, signs)
    state = model.state_dict()
    return {name: state[name].to(old.dtype) if name in known else old for name, old in tensors.items()}


def turn_block(
    block: nn.Module,
    family: Family,
    signs: Tensor | None,
    transforms: Sequence[str],
    quantized: Collection[str],
) -> tuple[str, ...]:
    """Rotate a float block, in place, as the `transforms` say; the linears whose inputs are now turned at run time.

    Only linears that are `quantized` are: a float one has nowhere to say so.
    """
    if signs is not None:
        rotate_block(block, family, signs.to(device_of(block)))
    if not any(each.turns_inner for each in transforms_of(transforms)):
        return ()
    turned = tuple(name for name in inner_readers(block, family) if name in quantized)
    for name in turned:
        module = block.get_submodule(name)
        set_weight(module, turn_columns(weight_of(module)))
    return turned


@contextmanager
def fed_through(block: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put a function before each of the named linears while the context is open; no hook stays behind."""

    def before(change: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    with ExitStack() as handles:
        for name, change in changes.items():
            handle = block.get_submodule(name).register_forward_pre_hook(partial(before, change))
            handles.callback(handle.remove)
        yield


def turned_inputs(block: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which the named linears of `block` see turned inputs."""
    return fed_through(block, dict.fromkeys(names, turn_inputs))
