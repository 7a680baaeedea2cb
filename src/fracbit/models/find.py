"""Which family a model belongs to: from the table by its config, else from its structure.

A model that also sees or hears holds a text model, whose own family is the one meant; towers for images and sound are no part
of it. An unknown architecture is still quantized: its blocks are the list of like modules in the text model that holds most of
the linear weights, and each linear in them counts as a group of its own. The returned family says so in its `note`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fracbit.errors import SourceError
from fracbit.models.blocks import SENSES, find, fused_experts, is_linear, is_table, shape_of, weight_of
from fracbit.models.code import CHANGED, CHANGED_IN_BLOCKS, CHANGED_INSIDE, names_in
from fracbit.models.experts import SplitExperts
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
    text, path = text_model(model)
    for family in (known_family(model.config), _inside(known_family(text.config), model, path)):
        stack = None if family is None else find(model, family.blocks)
        if family is not None and stack is not None and any(stack.children()):
            return family
    return discover(model)


def text_model(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The part of a model that reads text, and its path: the model itself unless it holds one for images or sound too."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    return (decoder, path) if path and isinstance(decoder, PreTrainedModel) else (model, "")


def tower_linears(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Full names of the linears in the repeated blocks of towers for images and sound, in the order of the modules.

    As in the blocks of `family`, those that choose experts, have one output or are changed by the model's code are left out.
    """
    within, before = text_model(model)[1], f"{family.blocks}."
    stacks = [
        (name, list(module.children()))
        for name, module in model.named_modules()
        if _is_stack(module)
        and not f"{name}.".startswith(before)
        and (SENSES.search(name) or (within and not name.startswith(f"{within}.")))
    ]
    found = {
        f"{path}.{number}.{name}": None
        for path, blocks in stacks
        for kept in (_kept(blocks, model),)
        for number, block in enumerate(blocks)
        for name, module in block.named_modules()
        if name and is_linear(module) and name not in kept
    }
    return tuple(found)


def _inside(family: Family | None, model: PreTrainedModel, path: str) -> Family | None:
    """The family of the text model at `path`, its places named from the root of `model`; the head is the whole model's."""
    if family is None or not path:
        return None
    root = family.blocks.partition(".")[0]

    def placed(name: str) -> str:
        return name.replace(root, path, 1) if name.startswith(f"{root}.") else name

    return replace(
        family,
        blocks=placed(family.blocks),
        embeddings=tuple(map(placed, family.embeddings)),
        head="".join(_path(model, model.get_output_embeddings())),
        final_norm=placed(family.final_norm),
    )


def discover(model: PreTrainedModel) -> Family:
    """A family read off the structure alone. Raises SourceError when the model has no repeated blocks with
    linears.
    """
    # The stack of blocks is the list with the most linear weights, one of the text model if it has any.
    stacks = [(name, module) for name, module in model.named_modules() if _is_stack(module)]
    within = text_model(model)[1]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    sizes = {
        name: (
            not within or name.startswith(f"{within}."),
            not SENSES.search(name),
            len(stack) == depth,
            _linear_size(stack),
        )
        for name, stack in stacks
        if _linear_size(stack)
    }
    path = max(sizes, key=lambda name: sizes[name], default="")
    if not path:
        raise SourceError(
            f"{type(model).__name__} has no list of repeated blocks that hold nn.Linear or Conv1D layers, "
            "so there is nothing to quantize block by block; "
            "use a decoder-only causal language model, or add a Family for it."
        )
    # What is in the blocks and around them.
    stack = list(model.get_submodule(path).children())
    table = _table_of(model)
    head: nn.Module | None = model.get_output_embeddings()
    kept = _kept(stack, text_model(model)[0])
    names = [name for name in _union(stack, is_linear) if name not in kept]
    fused = {name for block in stack for name, _ in fused_experts(block)}
    left = f" The fused experts ({', '.join(sorted(fused))}) stay float." if fused else ""
    kind = Counter(type(block).__name__ for block in stack).most_common(1)[0][0]
    return Family(
        name=f"{model.config.model_type}, by structure",
        model_types=(model.config.model_type,),
        blocks=path,
        embeddings=(*_path(model, table), *_tables_of_blocks(model)),
        head="".join(_path(model, head)),
        linears=tuple((name,) for name in names),
        norms=tuple(Norm(name, exclusive=False) for name in _union(stack, _is_norm)),
        keep_float=kept,
        note=(
            f"model type {model.config.model_type!r} is not in the table of families: took the {len(stack)} "
            f"blocks ({kind}) at {path!r} and {len(names)} linear names in them; "
            f"no norm is folded, and each linear counts as the only reader of its input.{left}{_said(kept)}"
        ),
    )


def _table_of(model: PreTrainedModel) -> nn.Module | None:
    """The table of token embeddings; None where a model has none, or several in one."""
    try:
        table: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if is_table(table) else None


def _tables_of_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Tables with a row of each token for every block (Gemma 3n and 4)."""
    named = model.named_modules()
    return tuple(name for name, module in named if name.endswith("per_layer") and is_table(module))


def _kept(stack: list[nn.Module], model: Any) -> dict[str, str]:
    """Names inside a block of linears that stay float, with the reason."""
    found = {
        name: CHANGED
        for part in (model, *model.children())
        for name in names_in(part.__class__, CHANGED_IN_BLOCKS)
        if any(is_linear(child) for block in stack if (child := find(block, name)) is not None)
    }
    for block in stack:
        for path, parent in block.named_modules():
            experts = {len(child) for child in parent.children() if isinstance(child, SplitExperts)}
            kind: Any = type(parent)
            changed = names_in(kind, CHANGED_INSIDE)
            for name, child in parent.named_children():
                if not is_linear(child):
                    continue
                out = shape_of(child)[0]
                if name in changed:
                    reason = CHANGED
                elif out == 1:
                    reason = "one output"
                elif out in experts or "router" in f"{name} {type(parent).__name__}".lower():
                    reason = "chooses experts"
                else:
                    continue
                found[f"{path}.{name}" if path else name] = reason
    return found


def _said(kept: Mapping[str, str]) -> str:
    """A sentence for every reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in kept.items():
        names[reason].append(name)
    return "".join(f" Float ({reason}): {', '.join(some)}." for reason, some in names.items())


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
