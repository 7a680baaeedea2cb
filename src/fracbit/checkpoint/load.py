"""Load a checkpoint, float or fracbit, as a transformers model: `from_pretrained` with fracbit's errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fracbit.checkpoint.complete import check_missing
from fracbit.checkpoint.formats.loaded import load_decoded
from fracbit.checkpoint.hf import register
from fracbit.checkpoint.opened import (
    Opened,
    check_finished,
    check_weight_types,
    model_config,
    open_checkpoint,
)
from fracbit.checkpoint.source import Source, find_folder
from fracbit.checkpoint.verify import verified
from fracbit.errors import FormatError, SourceError, blamed_on, check_choice
from fracbit.models.classes import auto_class
from fracbit.models.experts import split_experts
from fracbit.models.install import make_deterministic

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load(
    model: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    verify: bool = False,
    deterministic: bool = False,
) -> PreTrainedModel:
    """The model in a folder or of a hub id, ready to run on `device`; `dtype` is the type of all that is not quantized.

    Tensors that are missing, foreign or of another shape are errors, and so are packed values that no quantizer makes. `verify`
    also compares every tensor with its hash in the manifest, which reads the files twice.
    `deterministic`: products give a row the same bits in any batch, which takes longer for many rows (docs/serving.md).
    `device` "auto" spreads the blocks over all GPUs of this process (accelerate: the extra `fracbit[device-map]`).
    Raises `SourceError` when it cannot be read, `FormatError` when it is unfinished or of another format version, `KernelError`
    when no kernel here is deterministic.
    """
    source = open_checkpoint(model, trust_remote_code, revision)
    if verify:
        found = verified(source)
        if found.faults:
            more = f" and {len(found.faults) - 1} more faults" if len(found.faults) > 1 else ""
            raise FormatError(f"{model}: {found.faults[0]}{more}; copy or fetch it again")
    loaded = load_source(source, dtype, device, trust_remote_code)
    if deterministic:
        make_deterministic(loaded)
    return loaded


def load_opened(
    opened: Opened, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The float model of an opened checkpoint with its weights, mixtures of experts split into linears as in its skeleton.

    Head and embedding table are tied as the config says, even if `opened` is untied. Raises `SourceError`.
    """
    model = load_source(opened.source, dtype, device, opened.trust_remote_code)
    split_experts(model)
    return model


def load_source(
    source: Source, dtype: torch.dtype | str, device: str | torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """`load`, for files that are open already."""
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES, SourceError)
    if not source.config.get("quantization_config"):
        check_weight_types(source)
    spread = device == "auto"
    check_device("cpu" if spread else device)
    if source.decodings or source.quantization:
        return load_decoded(source, dtype, device, trust_remote_code)
    if source.remote is not None:
        source.remote.fetch_whole()  # transformers reads the files itself
    register()
    auto = auto_class(model_config(source, trust_remote_code))
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with blamed_on(f"{source.name} cannot be loaded by {auto.__name__}", SourceError):
            pair: Any = auto.from_pretrained(
                source.folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device_map="auto" if spread else None,
                output_loading_info=True,
            )
    finally:
        if shown:
            logging.enable_progress_bar()
    loaded: PreTrainedModel = pair[0]
    check_missing(source.name, pair[1]["missing_keys"], SourceError)
    return loaded.eval() if spread else loaded.to(torch.device(device)).eval()  # type: ignore[arg-type,no-any-return]


def check_device(device: str | torch.device) -> None:
    """Refuse a device that torch does not have here, before anything is read. Raises `SourceError`."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"device {str(device)!r} cannot be used here ({reason}); use cpu") from error


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises `SourceError` when there is none."""
    check_finished(model)
    folder = find_folder(str(model), trust_remote_code=trust_remote_code)
    with blamed_on(f"{model} has no tokenizer that transformers can read", SourceError):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def tokenizer_or_none(model: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, None if there is none: files of ids do not need it."""
    folder = find_folder(str(model), trust_remote_code=trust_remote_code)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    found = any((folder / name).is_file() for name in names)
    return load_tokenizer(folder, trust_remote_code) if found else None
