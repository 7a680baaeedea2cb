"""Reading a model through its `Family`: its blocks, their linears in groups of one input, sublayers, norms,
scaling pairs, weights.

Every function takes a live or meta-device module and returns names and views; nothing is changed here (see
install.py). A weight is always seen as `[out, in]`, also that of GPT-2's `Conv1D`, which is stored `[in,
out]`.
"""

import re
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from fracbit.errors import SourceError, WeightError
from fracbit.models.family import Family, Norm, Pair, fits

SENSES = re.compile(r"vision|visual|image|img|video|audio|speech|tower|talker")
"""Parts of the paths of blocks that do not read text."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module does nothing but multiply its input by a float weight and add a bias.

    That is `nn.Linear`, `Conv1D`, and those of their children that do the same: a router may be one that also picks experts.
    """
    return isinstance(module, (nn.Linear, Conv1D)) and _multiplies(module)


def _multiplies(module: nn.Module) -> bool:
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return kind is not NonDynamicallyQuantizableLinear  # attention of torch reads its weight
    if kind not in _TRIED:
        _TRIED[kind] = _tried(module)
    return _TRIED[kind]


_TRIED: dict[type[nn.Module], bool] = {}


def _tried(module: nn.Module) -> bool:
    """Whether a linear with a forward of its own gives what a linear gives, on small random numbers."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(size, generator=generator) for size in ((5, 3), (2, 4, 3))
    )  # [out, in], [samples, tokens, in]
    bias = None if getattr(module, "bias", None) is None else torch.randn(5, generator=generator)  # [out]
    small = copy(module)
    held = weight.T if is_transposed(module) else weight
    parameters = {"weight": held, "bias": bias}
    vars(small)["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in parameters.items()
    }
    try:
        found = small(x)  # [samples, tokens, out]
    except Exception:  # noqa: BLE001, code of any model
        return False
    wanted = nn.functional.linear(x, weight, bias)  # [samples, tokens, out]
    return (
        isinstance(found, torch.Tensor)
        and found.shape == wanted.shape
        and torch.allclose(found, wanted, atol=1e-4)
    )


def is_table(module: object) -> bool:
    """Whether a module looks rows up in a float table instead of multiplying by it."""
    return isinstance(module, nn.Embedding)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight `[in, out]`."""
    return isinstance(module, Conv1D)


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` below `root`, None where there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def blocks(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The repeated blocks in order, each with its full name such as `model.layers.3`.

    Raises SourceError when the model has no list of modules where the family says.
    """
    stack = find(model, family.blocks)
    if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
        raise SourceError(
            f"{type(model).__name__} has no blocks at {family.blocks!r}, where family {family.name!r} "
            "keeps them; pass the causal language model itself, or let family_of(model) find the blocks."
        )
    return [(f"{family.blocks}.{index}", block) for index, block in enumerate(stack)]


def borrowed(model: Any, path: str) -> dict[str, str]:
    """Names inside the block at `path` of tensors that are another block's too, with the full names that those have there."""
    within = f"{path}."
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name.removeprefix(within): owner
        for name, owner in ties.items()
        if name.startswith(within) and not owner.startswith(within)
    }


def _expand(block: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The names that the block holds; names with `*` once per expert, those of one expert together."""
    prefix = next((name.split(".*", 1)[0] for name in names if ".*" in name), None)
    if prefix is None:
        yield tuple(name for name in names if find(block, name) is not None)
        return
    experts = find(block, prefix)
    count = 0 if experts is None else sum(name.isdigit() for name, _ in experts.named_children())
    for index in range(count):
        filled = (name.replace("*", str(index)) for name in names)
        yield tuple(name for name in filled if find(block, name) is not None)


def expand(block: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that the block holds, `*` replaced by every expert's number."""
    return tuple(found for name in names for group in _expand(block, (name,)) for found in group)


def groups(block: nn.Module, family: Family) -> list[tuple[str, ...]]:
    """The block's linears in order of use, those that read one and the same input together.

    Raises SourceError where a mixture of experts is still fused into one tensor (`experts.split_experts`
    comes first).
    """
    fused = [name for name, _ in fused_experts(block)]
    if fused and any("*" in name for names in family.linears for name in names):
        raise SourceError(
            f"the experts of {', '.join(fused)} are fused into one tensor; "
            "call split_experts(model) before reading linears."
        )
    return [group for names in family.linears for group in _expand(block, names) if group]


def linears(block: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The block's linears by name inside the block, in order of use."""
    return {name: block.get_submodule(name) for group in groups(block, family) for name in group}


def fused_experts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold the matrices of all experts of a mixture in tensors of three dimensions."""
    return [(name, module) for name, module in block.named_modules() if _is_fused(module)]


def _is_fused(module: nn.Module) -> bool:
    own = module.named_parameters(recurse=False)
    return any(name.endswith("_proj") and tensor.dim() == 3 for name, tensor in own)


def sublayer_of(family: Family, linear: str) -> tuple[str, ...]:
    """The modules, applied in order, by the output of which a change of `linear` is judged (AdaDim's Eq. 1);
    the linear itself if the family names none.
    """
    for sublayer in family.sublayers:
        for pattern in sublayer.linears:
            found, star = _matches(pattern, linear)
            if found:
                return tuple(name.replace("*", star) for name in sublayer.modules)
    return (linear,)


def _matches(pattern: str, name: str) -> tuple[bool, str]:
    """Whether `name` fits `pattern`, and what stands for its `*` ("" when it has none)."""
    if "*" not in pattern:
        return pattern == name, ""
    head, tail = pattern.split("*")
    inner = name[len(head) : len(name) - len(tail)]
    return name == f"{head}{inner}{tail}" and inner.isdigit(), inner


def norms(block: nn.Module, family: Family) -> list[Norm]:
    """The block's norms that have a gain, each with the readers that this block holds."""
    present = [norm for norm in family.norms if isinstance(gain_of(block, norm.name), torch.Tensor)]
    return [Norm(norm.name, expand(block, norm.readers), norm.exclusive) for norm in present]


def gain_of(block: nn.Module, norm: str) -> torch.Tensor | None:
    """The stored gain of a norm `[width]` (add `family.gain_offset` for its effect), None if it has none."""
    module = find(block, norm)
    return None if module is None else dict(module.named_parameters(recurse=False)).get("weight")


def pairs(block: nn.Module, family: Family, config: Any) -> list[Pair]:
    """The block's linear-to-linear scaling pairs that hold for this config, one per expert where there are
    experts.
    """
    text = config.get_text_config()
    return [
        Pair(names[0], names[1:], pair.layout, pair.kv_heads)
        for pair in family.pairs
        if fits(pair.when, text)
        for names in _expand(block, (pair.source, *pair.readers))
        if len(names) > 1
    ]


def source_rows(block: nn.Module, pair: Pair, config: Any) -> torch.Tensor:
    """Which output row of `pair.source` feeds each input column of its readers: int64 [in].

    Scaling row `r` of the source (and its bias) by `s[r]` and dividing reader column `c` by `s[rows[c]]`
    leaves the model unchanged. With grouped queries one row feeds several columns, which then share one
    scale.
    """
    total = shape_of(block.get_submodule(pair.source))[0]
    width = shape_of(block.get_submodule(pair.readers[0]))[1]
    column = torch.arange(width)  # [in]
    if pair.layout == "rows":
        return total - width + column
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    named = pair.kv_heads
    kv = named if isinstance(named, int) else int(getattr(text, named or "", None) or heads)
    size = width // heads
    group = column // size // (heads // kv)  # [in], the key-value head that each column comes from
    if pair.layout == "values last":
        return total - kv * size + group * size + column % size
    queries = heads // kv
    return (group * (queries + 2) + queries + 1) * size + column % size


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, a router or an embedding table."""
    out, width = weight_of(module).shape
    return int(out), int(width)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as `[out, in]`, a detached view in the dtype it is stored in.

    Raises WeightError when the module has no float matrix as its weight.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.dim() != 2:
        raise WeightError(
            f"{type(module).__name__} has no two-dimensional float weight; "
            "a linear, Conv1D, router or embedding has one."
        )
    return weight.detach().T if is_transposed(module) else weight.detach()


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias `[out]` of a linear or norm, detached; None if it has none."""
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return None if bias is None else bias.detach()
