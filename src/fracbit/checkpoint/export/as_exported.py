"""The model that an export holds: its layers rounded again, or made floats, as the files have them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from fracbit.checkpoint.export.exporter import StoredModel, export
from fracbit.checkpoint.load import load


@contextmanager
def as_exported(
    stored: StoredModel, trust_remote_code: bool = False, form: str = "float:fp32"
) -> Iterator[PreTrainedModel]:
    """The model in fp32, from plain weights of the format `form` in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as place:
        export(
            stored.source.folder, f"{place}/float", form, like=stored.layers, trust_remote_code=trust_remote_code,
            progress=None,
        )  # fmt: skip
        yield load(f"{place}/float", torch.float32, trust_remote_code=trust_remote_code)
