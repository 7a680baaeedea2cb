"""Load a checkpoint, float or fracbit, as a transformers model: the same `from_pretrained`, with our errors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fracbit.checkpoint.hf import register
from fracbit.checkpoint.output import is_unfinished
from fracbit.checkpoint.source import Source, open_source
from fracbit.errors import FormatError, SourceError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load(
    model: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The model in a folder or of a hub id, ready to run on `device`; `dtype` is that of everything not quantized.

    `device` "auto" spreads the blocks over all GPUs of this process (accelerate: the extra `fracbit[device-map]`).
    Raises `SourceError` when it cannot be read, `FormatError` when it is unfinished or of another format version.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    spread = device == "auto"
    check_device("cpu" if spread else device)
    source = open_checkpoint(model, trust_remote_code, revision)
    register()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map="auto" if spread else None,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise SourceError(f"{model} cannot be loaded as a causal language model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if spread:
        return loaded.eval()  # type: ignore[no-any-return]
    return loaded.to(torch.device(device)).eval()  # type: ignore[arg-type,no-any-return]


def check_device(device: str | torch.device) -> None:
    """Refuse a device that torch does not have here, before anything is read. Raises `SourceError`."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"device {str(device)!r} cannot be used here ({reason}); use cpu") from error


def open_checkpoint(
    model: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Source:
    """The files of a finished checkpoint."""
    if is_unfinished(Path(model).expanduser()):
        raise FormatError(
            f"{model} is the unfinished output of `fracbit quantize`; continue it with --resume"
        )
    return open_source(str(model), revision, trust_remote_code)


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises `SourceError` when there is none."""
    source = open_checkpoint(model, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{model} has no tokenizer that transformers can read: {error}") from error


def tokenizer_or_none(model: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model when there is one: files of ids do not need it."""
    folder = open_checkpoint(model).folder
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return load_tokenizer(model) if any((folder / name).is_file() for name in names) else None
