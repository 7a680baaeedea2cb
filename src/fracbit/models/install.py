"""How a model's weights and modules are changed: set a weight, replace a module, bring a part into memory, free it.

Other packages change a model by these functions alone; in models/, fold.py and tweak.py also write gains and factors.

A model larger than memory is built on the meta device (skeleton.py); `materialize` gives one block its
tensors and `release` takes them away again.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from fracbit.errors import SourceError, WeightError
from fracbit.kernels import choose
from fracbit.models.blocks import is_linear, is_transposed, weight_of
from fracbit.models.family import Family
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Write `weight` [out, in] into a linear, in the dtype and orientation that it stores.

    Raises WeightError when the shape differs.
    """
    held = weight_of(module)
    if held.shape != weight.shape:
        raise WeightError(
            f"a weight of shape {tuple(weight.shape)} does not fit {type(module).__name__}, which holds "
            f"{tuple(held.shape)} [out, in]; pass it untransposed, also for Conv1D."
        )
    target = module.get_parameter("weight")
    with torch.no_grad():
        target.copy_(weight.T if is_transposed(module) else weight)  # [out, in], [in, out] where transposed


def set_tensor(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Write the parameter or buffer that is called `name` below `root`, in place and in the dtype that it has.

    Raises WeightError when the shape differs.
    """
    path, _, leaf = name.rpartition(".")
    held = getattr(root.get_submodule(path), leaf)
    if held.shape != tensor.shape:
        raise WeightError(f"a tensor of shape {tuple(tensor.shape)} does not fit {name}, {tuple(held.shape)}")
    with torch.no_grad():
        held.copy_(tensor)


def replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` where `path` leads below `root`; returns what was there."""
    parent, _, name = path.rpartition(".")
    holder = root.get_submodule(parent)
    before = holder.get_submodule(name)
    setattr(holder, name, module)
    return before


def make_deterministic(model: nn.Module, wanted: bool = True) -> None:
    """Let every product with a weight give a row the same bits in any batch, or no longer.

    Packed products then go by rows of codes alone, and those with float weights row by row: torch's sums depend on how many
    rows there are. Raises `KernelError` where no kernel of a packed weight can.
    """
    packed = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    for module in packed:
        choose(module.scheme, module.get_buffer("weight").device, module.shape).runner(wanted)
    for module in packed:
        module.make_deterministic(wanted)
    for linear in (module for module in model.modules() if is_linear(module)):
        linear.__dict__.pop("forward", None)
        if wanted:
            linear.forward = partial(_row_by_row, linear)


def _row_by_row(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a float `linear` gives for `x` [..., in], each row multiplied alone: [..., out]."""
    forward = type(linear).forward
    rows = [forward(linear, row[None]) for row in x.reshape(-1, x.shape[-1])]  # each [1, out]
    return torch.cat(rows).view(*x.shape[:-1], -1) if rows else forward(linear, x)


def untie_head(model: nn.Module, family: Family) -> None:
    """Give a head that is its embedding table a matrix of its own, equal to it."""
    head = model.get_submodule(family.head)
    table = model.get_submodule(family.embeddings[0])
    if head.weight is table.weight:
        head.weight = nn.Parameter(weight_of(table).clone(), requires_grad=False)


def materialize(
    root: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    partial: bool = False,
) -> None:
    """Give a meta-device module its tensors, by their names below `root`; floats are cast to `dtype` (None:
    as they are).

    Tied tensors need only one of their names. `partial=True` allows tensors to stay on the meta device (the
    blocks, while the embeddings and the head are brought in). Raises SourceError when a name is unknown, a
    shape differs or one is missing.
    """
    state = root.state_dict(keep_vars=True)
    _check(state, tensors)
    for name, tensor in tensors.items():
        cast = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        _assign(root, _sharing(state, tensors, name), cast)
    _move_buffers(root, device)
    if not partial:
        left = [name for name, tensor in root.state_dict().items() if tensor.is_meta]
        if left:
            raise SourceError(
                f"no tensors were given for {_some(left)}; "
                "the checkpoint must hold every weight of the model."
            )


def release(root: nn.Module) -> None:
    """Free the parameters and saved buffers below `root`: they go back to the meta device; shapes, dtypes and
    ties stay.
    """
    state = root.state_dict(keep_vars=True)
    _move_buffers(root, "cpu")
    for name in state:
        _assign(root, _aliases(state, name), torch.empty_like(state[name], device="meta"))


def _move_buffers(root: nn.Module, device: torch.device | str) -> None:
    """Bring the buffers that no checkpoint holds (rotary frequencies, masks) to where the weights are."""
    for module in root.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _check(state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    unknown = [name for name in tensors if name not in state]
    if unknown:
        raise SourceError(
            f"the model has no tensors named {_some(unknown)}; map the names of the checkpoint first."
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise SourceError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(state[name].shape)} "
                "in the model; config.json and the weights do not belong together."
            )


def _aliases(state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """All names of the tensor called `name`: tied modules must go on sharing it."""
    return [other for other, tensor in state.items() if tensor is state[name]]


def _sharing(state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """The names that get this tensor: a tied one with other values of its own in the checkpoint is no longer
    tied.
    """
    given = tensors[name]
    return [
        other
        for other in _aliases(state, name)
        if other == name or other not in tensors or torch.equal(tensors[other], given)
    ]


def _assign(root: nn.Module, names: list[str], tensor: torch.Tensor) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(parent)
        is_parameter = leaf in dict(module.named_parameters(recurse=False))
        setattr(module, leaf, parameter if is_parameter else tensor)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
