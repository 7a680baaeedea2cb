"""The export `gguf`: model.gguf, one file with the weights, the sizes and the tokenizer, as llama.cpp's converter orders them.

Integers with a step for every 32 weights are stored as they are (block_types.py). The file is written tensor by tensor, under a
temporary name, and renamed when it is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from fracbit.checkpoint.export.exporter import Nearest, StoredModel, Written
from fracbit.checkpoint.export.gguf.architectures import Architecture, architecture_of
from fracbit.checkpoint.export.gguf.block_types import GGUF_FORMS
from fracbit.checkpoint.export.gguf.header import add_header, vocabulary_bytes
from fracbit.checkpoint.export.gguf.package import package
from fracbit.checkpoint.export.gguf.placed import Placed, placed
from fracbit.checkpoint.export.gguf.vocabulary import Vocabulary, vocabulary_of
from fracbit.checkpoint.export.parameter import without_parameter
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.formats.gguf_record import fill, reserve
from fracbit.checkpoint.output import Output, WeightRecord
from fracbit.records.progress import Progress
from fracbit.records.run import LayerRecord, ShardRecord

FILE = "model.gguf"
OTHER_KEYS, TENSOR_BYTES = 16_384, 400
"""At most what keys besides the tokenizer take, and the name and place of a tensor with what a record says of it."""
LONGEST = -1.2345678901234567e-300  # no number has more letters


@dataclass(frozen=True, eq=False)
class GgufPlan:
    """What a file will hold."""

    architecture: Architecture
    tensors: Sequence[Placed]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class GgufFile:
    """The format `gguf`."""

    def check(self, model: PreTrainedModel, folder: Path) -> None:
        """Raise `FormatError` for a family, its settings or a tokenizer that llama.cpp does not run."""
        _known(model, folder)

    def nearest(self, layer: StoredLayer) -> Nearest:
        """See `Exporter`."""
        return GGUF_FORMS.nearest(layer)

    def beside(self, model: PreTrainedModel, folder: Path) -> int:
        """See `Exporter`."""
        architecture, vocabulary = _known(model, folder)
        tensors = len(model.state_dict(keep_vars=True))
        return vocabulary_bytes(folder, architecture, vocabulary) + OTHER_KEYS + TENSOR_BYTES * tensors

    def size(self, stored: StoredModel) -> int:
        """Bytes of the file, about. Raises `FormatError` for a model or tokenizer that llama.cpp does not run."""
        plan = planned(stored)
        return sum(tensor.bytes for tensor in plan.tensors) + self.beside(stored.model, stored.source.folder)

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """Write the file, unless `target` has it; one tensor is in memory at a time."""
        if target.record(FILE) is None:
            plan = planned(stored)
            target.write_file(FILE, lambda path: write_gguf(path, stored, plan, show, inside=target.inside))
        config = {
            name: value for name, value in stored.source.config.items() if name != "quantization_config"
        }
        return Written((FILE,), config)


def export_gguf(parameter: str = "") -> GgufFile:
    """The format; it takes no parameter. Raises `RecipeError` for one."""
    without_parameter("gguf", parameter)
    return GgufFile()


def planned(stored: StoredModel) -> GgufPlan:
    """What the file of a model will hold. Raises `FormatError`."""
    architecture, vocabulary = _known(stored.model, stored.source.folder)
    return GgufPlan(architecture, placed(stored, architecture), vocabulary)


def _known(model: PreTrainedModel, folder: Path) -> tuple[Architecture, Vocabulary]:
    """The architecture and the tokenizer as llama.cpp knows them. Raises `FormatError`."""
    package()
    config = model.config
    architecture = architecture_of(config.model_type, config.to_dict())
    return architecture, vocabulary_of(folder, architecture, int(config.vocab_size), str(folder))


def write_gguf(
    path: Path, stored: StoredModel, plan: GgufPlan, show: Progress, *, inside: WeightRecord | None = None
) -> ShardRecord:
    """Write the file; returns the records of the layers that were rounded again.

    `inside`: what the file itself is to say of its making; None where a folder around it says so.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, plan.architecture.name)
    if inside is not None:
        reserve(writer, len(json.dumps(inside(longest_records(stored)))))
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        rows = (*tensor.shape[:-1], tensor.bytes // math.prod(tensor.shape[:-1]))  # [.., bytes of a row]
        writer.add_tensor_info(tensor.name, rows, np.dtype(np.uint8), tensor.bytes, raw_dtype=kind)
    add_header(writer, stored, plan.architecture, plan.tensors, vocabulary=plan.vocabulary)
    layers: dict[str, LayerRecord] = {}
    total, done = sum(tensor.bytes for tensor in plan.tensors), 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            made, records = tensor.make()
            writer.write_tensor_data(made.numpy())
            layers |= records
            done += tensor.bytes
            show(tensor.name, done, total)
    finally:
        writer.close()
    if inside is not None:
        fill(path, inside(layers))
    return ShardRecord(layers=layers)


def longest_records(stored: StoredModel) -> dict[str, LayerRecord]:
    """Records of the layers that will be rounded again, as long as any that this can give."""
    return {
        name: LayerRecord(layer.scheme, LONGEST, LONGEST)
        for name, layer in stored.layers.items()
        if layer != stored.disk[name]
    }
