"""Every tensor of a GGUF file: its name, type and shape, and how its bytes are made, one at a time.

    layers, floats -> llama.cpp's names -> the experts of a projection together -> rows in order -> blocks

Names are those of the package `gguf`. Norms, biases and everything of one dimension are F32, other floats keep their type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.export.float import STORED, decoded, source_dtype
from fracbit.checkpoint.export.gguf.architectures import Architecture
from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES, type_of
from fracbit.checkpoint.export.gguf.frequencies import frequency_factors
from fracbit.checkpoint.export.gguf.package import package
from fracbit.checkpoint.export.gguf.size_keys import HEADS, ModelSettings
from fracbit.checkpoint.formats.gguf import inside_name
from fracbit.checkpoint.formats.gguf_rows import Change, change_of, falcon_rows, reading
from fracbit.errors import FormatError
from fracbit.models.blocks import find, is_transposed
from fracbit.records.run import LayerRecord

MadeRows: TypeAlias = tuple[Tensor, dict[str, LayerRecord]]
"""The rows uint8 [..., bytes] of a tensor, and records of the layers that were rounded again."""
ALWAYS_F32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd")
"""Float matrices that llama.cpp's converter keeps in F32: routers and learned positions."""
CONSTANTS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
"""Ends of the names of tensors that old checkpoints hold and no model needs."""
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: its name there, ggml's name of its type, its shape [.., out, in], its bytes, how it is made."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    make: Callable[[], MadeRows]


@dataclass(frozen=True, eq=False)
class Passage:
    """A stored model on its way into a file, and its config as a dictionary.

    `factors`: what all weights of a layer are multiplied by, [1] each, of the layers whose blocks are made already.
    """

    stored: StoredModel
    architecture: Architecture
    settings: ModelSettings
    factors: dict[str, Tensor] = field(default_factory=dict)


def placed(stored: StoredModel, architecture: Architecture) -> list[Placed]:
    """Every tensor of the file. Raises `FormatError` naming tensors without a place, or experts of several types."""
    found: dict[tuple[str, bool], list[str]] = {}
    for name, place in _places(stored, architecture).items():
        found.setdefault(place, []).append(name)
    passage = Passage(stored, architecture, stored.model.config.to_dict())
    factors = frequency_factors(stored.model.config)
    made = {
        inside: _stack(passage, names, inside) if many else _single(passage, names[0], inside)
        for (inside, many), names in found.items()
    }
    beside = [
        _factors(passage, names, inside)
        for (inside, _), names in found.items()
        if made[inside].kind in BLOCK_TYPES and BLOCK_TYPES[made[inside].kind].factor is not None
    ]
    return [*(_ready(name, tensor) for name, tensor in factors.items()), *made.values(), *beside]


# --- names ------------------------------------------------------------------------------------------------------------


def _places(stored: StoredModel, architecture: Architecture) -> dict[str, tuple[str, bool]]:
    """For every stored tensor, in the order of the model: its name in the file, and whether it is one of several experts."""
    gguf = package()
    kinds = {known: kind for kind, known in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], stored.model.config.num_hidden_layers)
    found = {}
    for name in _held(stored):
        inside, expert = inside_name(names, name, stored.model.base_model_prefix)
        if inside is None:
            raise FormatError(
                f"llama.cpp has no place for the tensor {name} in a model of its kind {architecture.name}; "
                "export float or another format"
            )
        found[name] = (inside, expert is not None)
    return found


def _held(stored: StoredModel) -> list[str]:
    """The stored tensors that the model has, in its order. Raises `FormatError` where one of its tensors is missing."""
    state = stored.model.state_dict(keep_vars=True)
    names = {*(f"{layer}.weight" for layer in stored.disk), *stored.rest}
    tensors = {id(state[name]) for name in names if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in tensors]
    if missing:
        raise FormatError(
            f"{stored.source.name} lacks {len(missing)} tensors of {type(stored.model).__name__}, such as {missing[0]}; "
            "quantize it again"
        )
    return [name for name in state if name in names and not name.endswith(CONSTANTS)]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _kind(stored: StoredModel, name: str, inside: str) -> str:
    """Ggml's name of the type that a tensor gets. Raises `FormatError` for one that is no float."""
    layer = name.removesuffix(".weight")
    kind = type_of(stored.layers[layer]) if layer in stored.layers else None
    if kind is not None:
        return kind
    dims = 2 if layer in stored.disk else len(stored.source.tensors[name].shape)
    stem = inside.removesuffix(".weight")
    vector = dims < 2 or stem == inside or stem.endswith("_norm") or stem.rpartition(".")[2] in ALWAYS_F32
    own = source_dtype(stored) if layer in stored.disk else STORED.get(stored.source.tensors[name].dtype)
    if own is None:
        raise FormatError(
            f"the tensor {name} is of the type {stored.source.tensors[name].dtype}, and format gguf has {', '.join(STORED)}"
        )
    return "F32" if vector else next(known for known, dtype in STORED.items() if dtype == own)


def _single(passage: Passage, name: str, inside: str) -> Placed:
    """A tensor that is one of the model's."""
    stored, layer = passage.stored, name.removesuffix(".weight")
    kind, module = _kind(stored, name, inside), find(stored.model, layer)
    transposed = module is not None and is_transposed(module) and layer != name
    turned = transposed and layer not in stored.disk  # a quantized one is stored [out, in]
    shape = stored.disk[layer].shape if layer in stored.disk else stored.source.tensors[name].shape
    shape = shape[::-1] if turned else tuple(shape)  # [out, in] or [out]
    change = _change(passage, inside, shape)

    def make() -> MadeRows:
        if kind in BLOCK_TYPES:
            packed, record = stored.exported(layer)
            rows = change.rows(BLOCK_TYPES[kind].rows(packed))  # [out, bytes]
            if (factor := BLOCK_TYPES[kind].factor) is not None:
                passage.factors[layer] = factor(packed)
            return rows, {} if record is None else {layer: record}
        tensor = _float_of(stored, name)
        return _raw(change.values(tensor.T if turned else tensor), kind), {}

    return Placed(inside, kind, shape, _bytes(kind, shape), make=make)


def _change(passage: Passage, inside: str, shape: tuple[int, ...]) -> Change:
    """What happens to the tensor called `inside` in the file, of this `shape` [out, in] or [out]. Raises `FormatError`."""
    architecture, settings = passage.architecture, passage.settings
    if architecture.groups is not None and ".attn_qkv." in inside:
        return Change(falcon_rows(int(HEADS(settings)), int(architecture.groups(settings)), shape[0]))
    try:
        return change_of(reading(architecture.like or architecture.name, settings, inside), shape, inside)
    except FormatError as error:
        raise FormatError(
            f"{error} in a {architecture.name}; export float, and convert that folder with convert_hf_to_gguf.py of llama.cpp"
        ) from error


def _stack(passage: Passage, names: Sequence[str], inside: str) -> Placed:
    """The experts of a projection, which share a tensor [experts, out, in]. Raises `FormatError` where their types differ."""
    parts = [_single(passage, name, inside) for name in names]
    first: dict[str, str] = {}
    for part, name in zip(parts, names, strict=True):
        first.setdefault(part.kind, name.removesuffix(".weight"))
    if len(first) > 1:
        told = ", ".join(f"{name} {kind}" for kind, name in list(first.items())[:SHOWN])
        raise FormatError(
            f"a GGUF file holds the experts of {inside} in one tensor of one type, and they have several: {told}; "
            "quantize all experts of a block with one scheme"
        )

    def make() -> MadeRows:
        made = [part.make() for part in parts]
        records = {name: record for _, own in made for name, record in own.items()}
        return torch.stack([rows for rows, _ in made]), records  # [experts, out, bytes]

    shape = (len(parts), *parts[0].shape)
    return Placed(inside, parts[0].kind, shape, sum(part.bytes for part in parts), make=make)


def _factors(passage: Passage, names: Sequence[str], inside: str) -> Placed:
    """What all weights of a tensor, whose blocks come before, are multiplied by, or those of each expert: [1] or [experts]."""

    def make() -> MadeRows:
        return _raw(torch.cat([passage.factors[name.removesuffix(".weight")] for name in names]), "F32"), {}

    shape = (len(names),)
    return Placed(f"{inside.removesuffix('.weight')}.scale", "F32", shape, _bytes("F32", shape), make=make)


def _ready(name: str, tensor: Tensor) -> Placed:
    """A tensor that is computed from the config."""
    shape = tuple(tensor.shape)
    return Placed(name, "F32", shape, _bytes("F32", shape), make=lambda: (_raw(tensor, "F32"), {}))


def _float_of(stored: StoredModel, name: str) -> Tensor:
    """A tensor that the file holds in floats, as it is stored or decoded."""
    layer = name.removesuffix(".weight")
    return decoded(stored, layer, source_dtype(stored)) if layer in stored.disk else stored.tensor(name)


def _raw(tensor: Tensor, kind: str) -> Tensor:
    """The bytes uint8 [..., in * size] of floats [..., in] in one of the plain types."""
    return tensor.to(STORED[kind]).contiguous().view(torch.uint8)


def _bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    row = BLOCK_TYPES[kind].row_bytes(shape[-1]) if kind in BLOCK_TYPES else shape[-1] * STORED[kind].itemsize
    return int(torch.Size(shape[:-1]).numel()) * row
