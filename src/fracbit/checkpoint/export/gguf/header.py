"""What stands in a GGUF file before its tensors: facts of the model in general, its sizes, and its tokenizer.

Every key has the value that llama.cpp's converter writes for the float checkpoint, with two exceptions. The name of the model
is that of the checkpoint's source, and nothing comes from a model card: the card beside the checkpoint is fracbit's own.

Ref: convert_hf_to_gguf.py of llama.cpp, build 11434.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.export.gguf.architectures import VOCABULARY, Architecture
from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES
from fracbit.checkpoint.export.gguf.package import package
from fracbit.checkpoint.export.gguf.placed import Placed
from fracbit.checkpoint.export.gguf.size_keys import besides
from fracbit.checkpoint.export.gguf.special_tokens import added_tokens, letters
from fracbit.checkpoint.export.gguf.vocabulary import Vocabulary, settings_in
from fracbit.checkpoint.read_manifest import manifest_of

FLOAT_FILES = {"F32": 0, "F16": 1, "BF16": 32}
"""llama.cpp's numbers of files that hold floats."""
SAMPLING = {
    "sequence": "string", "top_k": "int32", "top_p": "float32", "min_p": "float32", "xtc_probability": "float32",
    "xtc_threshold": "float32", "temp": "float32", "penalty_last_n": "int32", "penalty_repeat": "float32", "mirostat": "int32",
    "mirostat_tau": "float32", "mirostat_eta": "float32",
}  # fmt: skip
"""How llama.cpp draws tokens, where generation_config.json says it."""
OTHER_NAMES = {"temp": ("temperature",), "penalty_repeat": ("penalty_repeat", "repetition_penalty")}
"""What generation_config.json calls them, where that is another name."""


def add_header(
    writer: Any,
    stored: StoredModel,
    architecture: Architecture,
    tensors: Sequence[Placed],
    *,
    vocabulary: Vocabulary,
) -> None:
    """Give the `writer` of the package `gguf`, which knows the tensors, every key."""
    _add_general(writer, stored)
    settings = stored.model.config.to_dict()
    # Without tokens nothing else says how many there are.
    for key in architecture.keys if vocabulary.tokens else besides(architecture.keys, VOCABULARY):
        value = key.value(settings)
        if value is not None:
            getattr(writer, f"add_{key.kind}")(f"{architecture.name}.{key.name}", value)
    if architecture.says_type:
        writer.add_file_type(file_type(tensors))
    writer.add_quantization_version(package().GGML_QUANT_VERSION)
    _add_vocabulary(writer, stored.source.folder, vocabulary)


def vocabulary_bytes(folder: Path, architecture: Architecture, vocabulary: Vocabulary) -> int:
    """What the tokenizer takes in a file."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        writer = package().GGUFWriter(file.name, architecture.name)
        try:
            _add_vocabulary(writer, folder, vocabulary)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()
        return Path(file.name).stat().st_size


def file_type(tensors: Sequence[Placed]) -> int:
    """llama.cpp's number of a file with mostly such weights: the type of most weights of the blocks."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            weights[tensor.kind] += math.prod(tensor.shape)
    kind = weights.most_common(1)[0][0]
    return BLOCK_TYPES[kind].file_type if kind in BLOCK_TYPES else FLOAT_FILES[kind]


def _add_general(writer: Any, stored: StoredModel) -> None:
    """The name of the model, its size in words, and how tokens are drawn."""
    gguf = package()
    counts = writer.get_total_parameter_count()
    name = _source_name(stored)
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), hf_params=stored.source.config, model_path=Path(name), total_params=counts[0]
    )
    found.name = found.name or name
    found.size_label = found.size_label or gguf.size_label(*counts)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    generation = settings_in(stored.source.folder / "generation_config.json")
    for own, kind in SAMPLING.items():
        value = next(
            (generation[each] for each in OTHER_NAMES.get(own, (own,)) if generation.get(each) is not None),
            None,
        )
        if value is not None:
            getattr(writer, f"add_{kind}")(f"general.sampling.{own}", value)


def _source_name(stored: StoredModel) -> str:
    """The name of the folder or repository that the checkpoint was made from; its own where its manifest names none."""
    source = manifest_of(stored.source).get("source")
    name = source.get("name") if isinstance(source, Mapping) else None
    return Path(str(name or stored.source.name)).name or stored.source.folder.name


def _add_vocabulary(writer: Any, folder: Path, vocabulary: Vocabulary) -> None:
    """The tokenizer: tokens, special tokens, merges, chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    if not vocabulary.tokens:
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    rules, limit = vocabulary.rules, None if vocabulary.merges else len(vocabulary.tokens)
    special = package().SpecialVocab(folder, load_merges=vocabulary.merges, n_vocab=limit)
    special.add_special_token |= added_tokens(folder) | dict(rules.added)
    special.special_token_ids |= dict(rules.ids)
    special.add_to_gguf(writer, quiet=True)
    if rules.space is not None:
        writer.add_add_space_prefix(rules.space)
    for name, value in letters(folder).items():
        writer.add_bool(f"tokenizer.ggml.normalizer.{name}", value)
