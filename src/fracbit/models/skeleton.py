"""A model without its weights: the modules of any config on the meta device, so that a 176B model costs no
memory.

The streaming loop asks it which layers there are and how large (`quantizable`), and under which names the
checkpoint's files hold each of the model's tensors (`origins`): hub files may lack the base model's prefix
(GPT-2's and BLOOM's `h.0...`), hold tied tensors once, and name a mixture's experts one by one where
transformers fuses them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from fracbit.errors import SourceError
from fracbit.models.blocks import blocks, groups, is_transposed, shape_of
from fracbit.models.experts import is_fusing, split_experts
from fracbit.models.family import Family
from fracbit.models.find import family_of


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
    kind: Literal["linear", "embedding", "head"]
    group: str
    tied: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model lies on disk: a tensor's name and, where experts are fused there, the part
    of it.
    """

    name: str
    expert: int | None = None
    half: Literal["first", "second"] | None = None

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the tensor on disk that this origin names, a view."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.half is None else part.chunk(2)[0 if self.half == "first" else 1]


@dataclass(frozen=True)
class Origins:
    """The model's tensors by name with their place on disk, names on disk that no module needs, and names
    without a tensor.
    """

    tensors: dict[str, Origin]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


def skeleton(
    config: PreTrainedConfig, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a config on the meta device, in eval mode, its mixtures of experts split
    into linears.

    Buffers that no checkpoint holds (rotary frequencies) are computed, on the CPU. `attention` is
    transformers' `attn_implementation`. Raises SourceError when the config is not one of a causal language
    model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
            )
    except (ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]  # transformers goes on to list every config that it knows
        raise SourceError(
            f"no causal language model can be built from a config of type {config.model_type!r} "
            f"({reason}); "
            "use a decoder-only model that AutoModelForCausalLM knows (its own code needs trust_remote_code)."
        ) from error
    split_experts(model)
    _compute_buffers(model)
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
    if include_embeddings and table:
        found.append(_layer(model, table, "embedding", group=table))
    for index, (path, block) in enumerate(blocks(model, family)):
        for group in groups(block, family):
            first = f"{path}.{group[0]}"
            found += [_layer(model, f"{path}.{name}", "linear", group=first, block=index) for name in group]
    if include_head and family.head:
        tied = _tied(model, family.head, table)
        found.append(_layer(model, family.head, "head", group=family.head, tied=tied))
    return {layer.name: layer for layer in found}


def _layer(
    model: nn.Module,
    name: str,
    kind: Literal["linear", "embedding", "head"],
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


def origins(model: PreTrainedModel, disk_names: Iterable[str]) -> Origins:
    """Where each tensor of a skeleton lies among the tensor names of a checkpoint.

    Applies the renamings with which transformers itself loads this architecture. A tied tensor is listed
    under the name that the checkpoint holds and is not missing under the other.
    """
    state = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    experts = [rule for rule in mapping if isinstance(rule, WeightConverter) and is_fusing(rule)]
    tensors: dict[str, Origin] = {}
    unused = []
    for disk in disk_names:
        places = _places(disk, state, renamings=renamings, experts=experts, prefix=model.base_model_prefix)
        tensors.update(places)
        if not places:
            unused.append(disk)
    held = {id(state[name]) for name in tensors}
    missing = tuple(name for name, tensor in state.items() if id(tensor) not in held)
    return Origins(tensors, tuple(unused), missing)


def _places(
    disk: str,
    state: Iterable[str],
    *,
    renamings: list[WeightRenaming],
    experts: list[WeightConverter],
    prefix: str,
) -> dict[str, Origin]:
    """The tensors of the model that the tensor called `disk` holds: one, or every expert's part, or none."""
    renamed = disk
    for rule in renamings:
        renamed, _ = rule.rename_source_key(renamed)
    for candidate in (_split_name(renamed, experts), renamed, disk):
        for name in (candidate, f"{prefix}.{candidate}", candidate.removeprefix(f"{prefix}.")):
            if name in state:
                return {name: Origin(disk)}
            fused = _fused_places(disk, name, state)
            if fused:
                return fused
    return {}


def _split_name(name: str, experts: list[WeightConverter]) -> str:
    """A split expert's linear by the name that the hub gives it, such as `experts.3.w1` for `gate_proj`."""
    for rule in experts:
        stem, _, fused = rule.target_patterns[0].rpartition(".")
        leaves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for pattern, leaf in zip(rule.source_patterns, leaves, strict=False):
            found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)") + "$", name)
            if found and found.groups():
                return f"{name[: found.start()]}{stem}.{found[1]}.{leaf}.weight"
    return name


def _fused_places(disk: str, name: str, state: Iterable[str]) -> dict[str, Origin]:
    """The parts of a tensor that holds all experts of a block, as transformers 5 keeps them in memory."""
    stem, _, fused = name.rpartition(".")
    halves: tuple[tuple[str, Literal["first", "second"] | None], ...]
    if fused == "gate_up_proj":
        halves = (("gate_proj", "first"), ("up_proj", "second"))
    elif fused == "down_proj":
        halves = (("down_proj", None),)
    else:
        return {}
    found: dict[str, Origin] = {}
    while f"{stem}.{len(found) // len(halves)}.{halves[0][0]}.weight" in state:
        expert = len(found) // len(halves)
        found |= {f"{stem}.{expert}.{leaf}.weight": Origin(disk, expert, half) for leaf, half in halves}
    return found
