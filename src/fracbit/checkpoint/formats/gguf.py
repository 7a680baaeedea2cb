"""GGUF, llama.cpp's files: one file with the weights in blocks along the inputs, the sizes of the model, and its tokenizer.

    blocks uint8 [out, in / block * bytes]      F16, BF16 and F32 are stored as they are

The package `gguf` (the extra `fracbit[gguf]`) reads the header, decodes the blocks and has llama.cpp's names; transformers
turns the metadata into a config and a tokenizer, and undoes what llama.cpp's converter does to some tensors (rows of q and k in
another order, 1 added to norms). Scaled rotary frequencies are checked against the scaling that the config then names.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.gguf_rows import (
    Change,
    Reading,
    StoredBlocks,
    change_of,
    falcon_rows,
    reading,
)
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.place import GGUF
from fracbit.checkpoint.source import Source, TensorInfo
from fracbit.errors import SourceError, blamed_on
from fracbit.models.classes import auto_class
from fracbit.models.skeleton import skeleton
from fracbit.records.extras import check_extra

PREFIX = "GGUF "
"""Before the name of a type of blocks, as the type of a stored tensor."""
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}
DECODED = "F16"
"""The type of decoded blocks. Their scales are F16, and a code times a scale loses less than in BF16."""
ROPE = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What llama.cpp does not write of Llama 3's scaling of positions: the same in all released models."""
EXPERTS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Sizes of a mixture that transformers does not read from these files, by llama.cpp's name."""
UNSURE = ("gpt-oss", "gpt_oss", "qwen35", "qwen35moe", "lfm2")
"""Architectures of which transformers' reader of single tensors does not undo everything."""


@dataclass(frozen=True, eq=False)
class Header:
    """What stands before the tensors: metadata without the vocabulary, and for every tensor its type, shape and first byte."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's kind."""
        return str(self.metadata.get("general.architecture", ""))

    def own(self, key: str) -> Any:
        """An entry of the architecture's own."""
        return self.metadata.get(f"{self.architecture}.{key}")


def _gguf() -> Any:
    """The package `gguf`. Raises `SourceError` where it is not installed."""
    check_extra("reading a GGUF file", "gguf", "gguf", SourceError)
    import gguf

    return gguf


def header(path: Path) -> Header:
    """The header of a file. Raises `SourceError` for a file that is cut or no GGUF, or one of several."""
    with blamed_on(f"{path} is no GGUF file, or cut; fetch it again", SourceError, parsing=True):
        state = path.stat()
        return _header(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _header(path: Path, changed: int, size: int) -> Header:
    """The header of a file as it was at the time `changed`."""
    reader = _reader(path, changed, size)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.")
    }
    tensors = {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(int(size) for size in reversed(tensor.shape)),
            int(tensor.data_offset),
        )
        for tensor in reader.tensors
    }
    ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    if max(ends, default=0) > size:
        raise SourceError(f"{path} ends inside a tensor; fetch it again")
    if int(metadata.get("split.count", 0)) > 1:
        raise SourceError(
            f"{path} is one of {metadata['split.count']} files of a model; join them with `llama-gguf-split --merge`, and name "
            "the one file"
        )
    return Header(metadata, tensors)


@lru_cache(maxsize=1)
def _reader(path: Path, changed: int, size: int) -> Any:
    """The reader of the package `gguf` for a file as it was at the time `changed`. It takes seconds for a large vocabulary."""

    class Reader(_gguf().GGUFReader):  # type: ignore[misc]
        data: np.ndarray

        def _get(self, offset: int, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):  # whose slices take three times as long as those of an array
                self.data = self.data.view(np.ndarray)
            return super()._get(offset, *args, **kwargs)

    return Reader(path)


@contextmanager
def _read_once(path: Path) -> Iterator[None]:
    """A context in which transformers reads the header of this file with the reader that has read it."""
    state, gguf = path.stat(), _gguf()
    usual = gguf.GGUFReader
    known = _reader(path, state.st_mtime_ns, state.st_size)

    def reader(asked: Any, *args: Any, **kwargs: Any) -> Any:
        return known if Path(asked).resolve() == path else usual(asked, *args, **kwargs)

    try:
        with patch.object(gguf, "GGUFReader", reader):
            yield
    finally:
        _reader.cache_clear()  # an array for every token


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file as they lie there: floats, and blocks as bytes [..., out, bytes of a row]."""
    sizes = _gguf().GGML_QUANT_SIZES
    types = _gguf().GGMLQuantizationType
    found = {}
    for name, (kind, shape, start) in header(path).tensors.items():
        if kind in PLAIN:
            found[name] = TensorInfo(str(path), PLAIN[kind], shape, start)
        else:
            weights, size = sizes[types[kind]]
            found[name] = TensorInfo(
                str(path), PREFIX + kind, (*shape[:-1], shape[-1] // weights * size), start
            )
    return found


# The folder that a file stands for --------------------------------------------------------------------------------------


def unpacked(path: Path) -> Path:
    """A folder with the config and the tokenizer of a file, as transformers reads them, until this process ends.

    Raises `SourceError` for a file that cannot be read, or an architecture that is not known.
    """
    state = path.stat()
    return _unpacked(path.resolve(), state.st_mtime_ns, state.st_size)


def weights_of(folder: Path) -> Path | None:
    """The file that a folder of `unpacked` stands for."""
    return _MADE.get(folder)


_MADE: dict[Path, Path] = {}
"""The folders of `unpacked`, which hold no weights, and their files."""


@cache
def _unpacked(path: Path, changed: int, size: int) -> Path:
    head = header(path)
    with _read_once(path):
        return _folder(path, head)


def _folder(path: Path, head: Header) -> Path:
    with blamed_on(f"{path} has a header that cannot be read; fetch it again", SourceError, parsing=True):
        config = _config(path, head)
    folder = Path(tempfile.mkdtemp(prefix="fracbit-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with suppress(SourceError), blamed_on(f"{path} has no tokenizer that transformers can read", SourceError):
        # Without one, `decode` adds a note.
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        template = head.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):  # which transformers leaves in the file
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _MADE[folder] = path
    return folder


def _config(path: Path, head: Header) -> dict[str, Any]:
    """The entries of config.json. Raises `SourceError`."""
    if head.architecture in UNSURE:
        raise SourceError(
            f"{path} holds a {head.architecture}, whose tensors cannot be read one by one from GGUF; use the release in "
            "safetensors"
        )
    what = head.architecture or "model of no name"
    with blamed_on(f"{path} holds a {what}, which transformers does not read from GGUF", SourceError):
        made = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    made = _with_experts(made, head)
    config: dict[str, Any] = json.loads(made.to_json_string())
    config.pop("_model_name_or_path", None)
    config |= {
        flag: True for flag, tensor in BIASES.items() if hasattr(made, flag) and tensor in head.tensors
    }
    found = {name: head.own(key) for key, name in EXPERTS.items() if hasattr(made, name)}
    config |= {name: int(size) for name, size in found.items() if size is not None}
    epsilon = head.own("attention.layer_norm_epsilon")
    if epsilon is not None:
        config |= {name: float(f"{epsilon:.6g}") for name in EPSILONS if hasattr(made, name)}
    config |= _groups_of_falcon(head)
    types = {kind for kind, shape, _ in head.tensors.values() if len(shape) > 1}
    floats = {"F32": "float32", "F16": "float16"}
    config["architectures"] = [auto_class(made)._model_mapping[type(made)].__name__]
    config["dtype"] = next((floats[kind] for kind in floats if types == {kind}), "bfloat16")
    return {**config, **_positions(path, head, made)}


def _with_experts(made: PreTrainedConfig, head: Header) -> PreTrainedConfig:
    """The config of Mixtral, which llama.cpp calls a Llama with experts; any other as it is."""
    experts = head.own("expert_count")
    if head.architecture != "llama" or not experts:
        return made
    usual = AutoConfig.for_model("mixtral").to_dict()
    own = ("model_type", "architectures", "transformers_version")
    shared = {name: value for name, value in made.to_dict().items() if name in usual and name not in own}
    used = int(head.own("expert_used_count"))
    return AutoConfig.for_model("mixtral", **shared, num_local_experts=int(experts), num_experts_per_tok=used)


def _groups_of_falcon(head: Header) -> dict[str, Any]:
    """What transformers does not read of a Falcon whose heads share several k and v: the larger models."""
    groups = int(head.own("attention.head_count_kv") or 1)
    if head.architecture != "falcon" or groups == 1:
        return {}
    norms = 2 if "blk.0.attn_norm_2.weight" in head.tensors else 1
    return {"new_decoder_architecture": True, "num_kv_heads": groups, "num_ln_in_parallel_attn": norms}


EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
"""What configs call the number that keeps a layer norm from dividing by 0, which transformers reads for some."""
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Switches of a config that transformers does not set, by a tensor that shows them."""
YARN = tuple(
    f"rope.scaling.{name}"
    for name in (
        "attn_factor",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_log_multiplier",
    )
)
"""Keys of yarn that would change positions, and are not read."""


def _positions(path: Path, head: Header, config: PreTrainedConfig) -> dict[str, Any]:
    """How positions are scaled, which transformers does not read from these files. Raises `SourceError` for other ways."""
    usual = dict(getattr(config, "rope_parameters", None) or {})
    kind, factor = head.own("rope.scaling.type"), head.own("rope.scaling.factor")
    if ROPE in head.tensors:
        return {"rope_parameters": _llama3(path, head, config, usual)}
    others = [name for name in head.tensors if name.startswith("rope_")]
    if others or kind not in (None, "none", "linear", "yarn"):
        raise SourceError(
            f"{path} scales positions in a way that is not read from GGUF ({others[0] if others else kind}); use the release "
            "in safetensors"
        )
    if kind in (None, "none") or factor in (None, 1):
        return {}
    scaling = {**usual, "rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        length, unread = (
            head.own("rope.scaling.original_context_length"),
            [key for key in YARN if head.own(key) is not None],
        )
        if length is None or unread:
            what = (
                f"sets {unread[0]}, which is not read"
                if unread
                else "has no rope.scaling.original_context_length"
            )
            raise SourceError(f"{path} scales positions by yarn and {what}; use the release in safetensors")
        scaling["original_max_position_embeddings"] = int(length)
    return {"rope_parameters": scaling}


def _llama3(path: Path, head: Header, config: PreTrainedConfig, usual: dict[str, Any]) -> dict[str, Any]:
    """The scaling of Llama 3, whose factors the file must hold. Raises `SourceError` where they are others."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, shape, start = head.tensors[ROPE]
    factors = torch.from_numpy(
        np.fromfile(path, np.float32, shape[0], offset=start).copy()
    )  # [head size / 2]
    scaling = {**usual, **LLAMA3, "rope_type": "llama3", "factor": float(f"{float(factors.max()):.6g}")}
    config.rope_parameters = scaling
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(factors)
    plain = float(scaling["rope_theta"]) ** -(torch.arange(0, size, 2) / size)  # [head size / 2]
    if not torch.allclose(plain / frequencies, factors, rtol=1e-3):
        raise SourceError(
            f"{path} scales positions by factors ({ROPE}) that are not those of Llama 3; use the release in safetensors"
        )
    return scaling


# The tensors ------------------------------------------------------------------------------------------------------------


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the tensors lie in a GGUF file."""
    return any(info.file.endswith(GGUF) for info in tensors.values())


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every tensor of the model, under transformers' names. Raises `SourceError`."""
    if not seen(source.tensors):
        return Decoded("", {})
    head = header(Path(next(iter(source.tensors.values())).file))
    config = AutoConfig.from_pretrained(source.folder)
    places = dict(_places(head, config, source.tensors))
    found, views = {}, {}
    for name, (inside, expert) in places.items():
        info, view = source.tensors[inside], inside
        if expert is not None:
            view = f"{inside}[{expert}]"
            info = views[view] = _slice(info, expert)
        found[name] = _decoding(head, config, inside, view=view, info=info)
        if _beside(inside) in source.tensors:
            found[name] = _times(found[name], _beside(inside), expert or 0)
    used = {inside for inside, _ in places.values()} | {_beside(inside) for inside, _ in places.values()}
    left = sorted(source.tensors.keys() - used - {ROPE})
    missed = [name for name in left if _in_model(name, head)]
    if missed:
        raise SourceError(
            f"{source.name} holds {len(missed)} tensors that its model has no place for, such as {missed[0]}: without them it "
            "would compute something else; use the release in safetensors"
        )
    notes = (
        [f"{len(left)} tensors have no place in the model and were left out: {left[0]}, ..."] if left else []
    )
    if not (source.folder / "tokenizer_config.json").is_file():
        notes.append(
            "transformers makes no tokenizer of this file; put that of the released model into the output"
        )
    types = sorted({head.tensors[inside][0] for inside, _ in places.values()} - PLAIN.keys())
    title = f"GGUF, {', '.join(types) or 'floats'}"
    unused = frozenset(left) | {ROPE}
    return Decoded(title, found, unused, tuple(notes), views=views, rounded=bool(types))


def _in_model(name: str, head: Header) -> bool:
    """Whether a tensor belongs to the layers that predict the next id, and not to further ones behind them."""
    block = re.match(r"blk\.(\d+)\.", name)
    further = int(head.own("nextn_predict_layers") or 0)
    return block is None or int(block[1]) < int(head.own("block_count")) - further


def _places(
    head: Header, config: PreTrainedConfig, held: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """For each tensor of the model that the file holds: its name there, and which expert of it."""
    gguf = _gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[head.architecture], int(head.own("block_count")))
    model = skeleton(config)
    for name in model.state_dict():
        full = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        inside, expert = inside_name(names, full, model.base_model_prefix)
        if inside is not None and inside in held:
            yield name, (inside, expert)


def inside_name(names: Any, name: str, prefix: str = "") -> tuple[str | None, int | None]:
    """What llama.cpp calls a tensor of a model, None where it has no place, and the number of its expert.

    `names`: the table of the package `gguf` for the architecture. `prefix`: of the base model, which some names there lack.
    """
    stem, _, leaf = name.rpartition(".")
    parts = stem.split(".")
    number = parts.index("experts") + 1 if "experts" in parts[:-1] else 0
    expert = int(parts.pop(number)) if number and parts[number].isdigit() else None
    plain = ".".join(parts)
    found = names.get_name(plain) or names.get_name(plain.removeprefix(f"{prefix}."))
    return (None if found is None else f"{found}.{leaf}"), expert


def _slice(info: TensorInfo, expert: int) -> TensorInfo:
    """One expert's part of a tensor that holds those of all."""
    assert info.start is not None
    size = info.bytes // info.shape[0]
    return TensorInfo(info.file, info.dtype, info.shape[1:], info.start + expert * size)


def _beside(inside: str) -> str:
    """The tensor that holds what all weights of a tensor are multiplied by, one number or one for each expert."""
    return f"{inside.removesuffix('.weight')}.scale"


def _times(decoding: Decoding, beside: str, expert: int) -> Decoding:
    """A decoded tensor times its number in the tensor `beside`."""
    decode = decoding.decode

    def factor(parts: Mapping[str, Tensor]) -> Tensor:
        return parts["factor"].view(-1)[expert].float()  # []

    return replace(
        decoding,
        parts={**decoding.parts, "factor": Part(beside)},
        decode=lambda parts: decode(parts) * factor(parts),
        codes=lambda parts: replace(_blocks_of(decoding, parts), factor=float(factor(parts))),
    )


def _blocks_of(decoding: Decoding, parts: Mapping[str, Tensor]) -> StoredBlocks:
    assert decoding.codes is not None
    found = decoding.codes(parts)
    assert isinstance(found, StoredBlocks)
    return found


def _decoding(
    head: Header, config: PreTrainedConfig, inside: str, *, view: str, info: TensorInfo
) -> Decoding:
    """How a tensor is made; by rows where transformers' processing leaves its values as they are."""
    kind, shape, _ = head.tensors[inside]
    shape = shape[len(shape) - len(info.shape) :]
    process = _processing(head, config, inside)
    blank = np.broadcast_to(np.float32(0), shape)
    made = process(blank)
    values = partial(_values, kind=kind)
    same = made is blank

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        found = values(parts["blocks"])
        return found if same else torch.from_numpy(np.ascontiguousarray(process(found.float().numpy())))

    def change() -> Change:
        return change_of(process, shape, inside)

    return Decoding(
        TensorInfo(info.file, PLAIN.get(kind, DECODED), tuple(made.shape)),
        {"blocks": Part(view, rows=int(same))},
        decode,
        upright=False,
        scheme=kind,
        codes=None if kind in PLAIN else lambda parts: StoredBlocks(kind, parts["blocks"], change()),
        floats=(lambda tensor: change().values(tensor)) if kind in PLAIN else None,
    )


def _values(blocks: Tensor, kind: str) -> Tensor:
    """The floats of stored rows."""
    if kind in PLAIN:
        return blocks
    gguf = _gguf()
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


def _processing(head: Header, config: PreTrainedConfig, inside: str) -> Reading:
    """What transformers does to a tensor of this name after it is decoded."""
    usual = reading(head.architecture, config.to_dict(), inside)
    groups = int(_groups_of_falcon(head).get("num_kv_heads", 0))

    def process(values: np.ndarray) -> np.ndarray:
        if groups and ".attn_qkv." in inside:
            back = falcon_rows(int(head.own("attention.head_count")), groups, len(values)).argsort()  # [out]
            return np.ascontiguousarray(values[back.numpy()])
        if "ffn_gate_inp_shexp" in inside:  # one row, which transformers expects without its axis
            values = values.reshape(-1)  # [in]
        return usual(values)

    return process


GGUF_FILE = SourceFormat(seen, decode)
