"""Rotations in the loop: of the residual stream, folded into the weights, and of the MLP's inner states, at run time.

`rotate`: the residual stream holds x R instead of x (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, stage 1a).
Embeddings and the linears that write the stream are rotated. The gains of norms are folded into the linears that read
them, and these are rotated back. Nothing is left to do at run time. A head that is tied to the embedding table becomes
a matrix of its own, because it also takes the final norm's gain.

`rotate-mlp`: at run time the input of every quantized down projection is multiplied by a Hadamard matrix (stage 1d),
and the stored weight holds the inverse. The checkpoint records this, and `QuantLinear` does it.
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
    """Whether the `transforms` split a tied head and embedding table into two matrices."""
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
    """The `tensors` outside the blocks, rotated, in their stored types. They are also put into the model."""
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
    """Rotate a float block in place, as the `transforms` say. Returns the linears whose inputs are rotated at run time.

    These are `quantized` linears only: the checkpoint cannot record a rotation for a float one.
    """
    if signs is not None:
        rotate_block(block, family, signs.to(device_of(block)))
    if not any(each.turns_inner for each in transforms_of(transforms)):
        return ()
    turned = tuple(name for name in inner_readers(block, family) if name in quantized)
    for name in turned:
        module = block.get_submodule(name)
        set_weight(module, turn_columns(weight_of(module)))  # [out, in]
    return turned


@contextmanager
def fed_through(block: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """A context in which a function changes the input of each named linear; its hooks are removed afterwards."""

    def before(change: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    with ExitStack() as handles:
        for name, change in changes.items():
            handle = block.get_submodule(name).register_forward_pre_hook(partial(before, change))
            handles.callback(handle.remove)
        yield


def turned_inputs(block: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which the named linears of `block` see rotated inputs."""
    return fed_through(block, dict.fromkeys(names, turn_inputs))
