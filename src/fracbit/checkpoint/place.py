"""Where a model's name leads: a folder, a GGUF file, the bundled model, or a hub id that is fetched. Torch-free.

So that a command line refuses a model that is not there before torch is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

from fracbit.bundled import BUNDLED, bundled_model
from fracbit.errors import SourceError, near_matches
from fracbit.records.files import named_path

GGUF = ".gguf"
CONFIGS = ("config.json", "adapter_config.json")
"""A model folder has one of these: its own config, or that of an adapter."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


def find_place(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder, or the GGUF file, that a model's name stands for; a hub id is fetched. Raises `SourceError`."""
    return _local(model) or _fetch(model, revision, (*_FETCHED, "*.py") if trust_remote_code else _FETCHED)


def is_local(model: str) -> bool:
    """Whether a name stands for something on this machine, and is no hub id. Raises `SourceError` for neither."""
    return _local(model) is not None


def fetch_small(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a hub id in the cache with everything but weights, fetched first. Raises `SourceError`."""
    small = tuple(pattern for pattern in _FETCHED if pattern != "*.safetensors")
    return _fetch(model, revision, (*small, "*.py") if trust_remote_code else small)


def check_model(model: str, revision: str | None = None) -> None:
    """Refuse a model that is not there; of a hub id only the config is fetched. Raises `SourceError`."""
    place = _local(model) or _fetch(model, revision, CONFIGS)
    if (
        place.is_dir()
        and not any((place / name).is_file() for name in CONFIGS)
        and not any(place.glob(f"*{GGUF}"))
    ):
        raise SourceError(
            f"{place} has no config.json: a model folder holds config.json, safetensors and a tokenizer"
        )


def _local(model: str) -> Path | None:
    """The folder or file of a name here; None for a hub id. Raises `SourceError` for anything else."""
    path = named_path(model, SourceError)
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return path
    if model == BUNDLED:
        return bundled_model()
    if path.exists():
        raise SourceError(
            f"{model} is a file; name the folder that holds config.json and the safetensors files, or a {GGUF} file"
        )
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise SourceError(
            f"no such model: {model} is not a folder; {_beside(path)}name a folder, a hub id such as owner/name, or {BUNDLED}"
        )
    return None


def _beside(path: Path) -> str:
    """`did you mean ...? `: a folder or file beside the one that is not there, of nearly its name."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.is_dir() or each.suffix == GGUF]
    except OSError:
        return ""
    said, mark, _ = near_matches(path.name, names).partition("? ")
    return f"{said}? " if mark else ""


def _fetch(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder of a hub id in the cache, fetched first where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=[*patterns], ignore_patterns="*/*")
        )
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceError(
            f"no such model: {model} is neither a folder here nor on the hub; {_beside(Path(model))}look up its id there"
        ) from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated: accept its terms on the hub, then run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise SourceError(
            f"no such model: {model} is neither a folder here nor in the cache, and the hub cannot be reached or offline "
            f"mode is set (HF_HUB_OFFLINE); {_beside(Path(model))}name a local folder, or fetch it first with `hf download`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{model} could not be fetched from the hub: {error}") from error
