"""Which family a model belongs to: from the table by its config, else from its structure.

An unknown architecture is still quantized: its blocks are the list of like modules that holds most of the
linear weights, and each linear in them counts as a group of its own. The returned family says so in its
`note`.
"""

from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fracbit.errors import SourceError
from fracbit.models.blocks import find, fused_experts, is_linear, weight_of
from fracbit.models.families import FAMILIES
from fracbit.models.family import Family, Norm, fits


def known_family(config: PreTrainedConfig) -> Family | None:
    """The first family of the table that covers this config, None when there is none."""
    for family in FAMILIES:
        if config.model_type in family.model_types and fits(family.when, config):
            return family
    return None


def family_of(model: PreTrainedModel) -> Family:
    """The family of a live or meta-device model: from the table, else found by structure with a note.

    For a config alone call `family_of(skeleton(config))`, which costs no memory. Raises SourceError when
    nothing repeats.
    """
    family = known_family(model.config)
    stack = None if family is None else find(model, family.blocks)
    return family if family is not None and stack is not None and any(stack.children()) else discover(model)


def discover(model: PreTrainedModel) -> Family:
    """A family read off the structure alone. Raises SourceError when the model has no repeated blocks with
    linears.
    """
    # The stack of blocks is the list with the most linear weights.
    sizes = {name: _linear_size(stack) for name, stack in model.named_modules() if _is_stack(stack)}
    path = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(path):
        raise SourceError(
            f"{type(model).__name__} has no list of repeated blocks that hold nn.Linear or Conv1D layers, "
            "so there is nothing to quantize block by block; "
            "use a decoder-only causal language model, or add a Family for it."
        )
    # What is in the blocks and around them.
    stack = list(model.get_submodule(path).children())
    table: nn.Module = model.get_input_embeddings()
    head: nn.Module | None = model.get_output_embeddings()
    names = _union(stack, is_linear)
    fused = {name for block in stack for name, _ in fused_experts(block)}
    left = f" The fused experts ({', '.join(sorted(fused))}) stay float." if fused else ""
    kind = Counter(type(block).__name__ for block in stack).most_common(1)[0][0]
    return Family(
        name=f"{model.config.model_type}, by structure",
        model_types=(model.config.model_type,),
        blocks=path,
        embeddings=_path(model, table),
        head="".join(_path(model, head)),
        linears=tuple((name,) for name in names),
        norms=tuple(Norm(name, exclusive=False) for name in _union(stack, _is_norm)),
        note=(
            f"model type {model.config.model_type!r} is not in the table of families: took the {len(stack)} "
            f"blocks ({kind}) at {path!r} and {len(names)} linear names in them; "
            f"no norm is folded, and each linear counts as the only reader of its input.{left}"
        ),
    )


def _is_stack(module: nn.Module) -> bool:
    """A list of modules that are called one by one: neither of plain linears nor of further lists."""
    children = list(module.children())
    inner = (nn.ModuleList, nn.ModuleDict)
    return (
        isinstance(module, nn.ModuleList)
        and bool(children)
        and not any(isinstance(child, inner) or is_linear(child) for child in children)
    )


def _linear_size(stack: nn.Module) -> int:
    return sum(weight_of(module).numel() for module in stack.modules() if is_linear(module))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _union(stack: list[nn.Module], wanted: Any) -> list[str]:
    """Names inside a block of the modules that are `wanted`, over all blocks, in order of first appearance."""
    found = {name: None for block in stack for name, module in block.named_modules() if wanted(module)}
    return list(found)


def _path(model: nn.Module, wanted: nn.Module | None) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if module is wanted)[:1]
