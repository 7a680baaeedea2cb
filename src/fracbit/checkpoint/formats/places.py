"""What a path stands for that is not a folder of safetensors: a GGUF file, an adapter, weights under other names."""

from __future__ import annotations

from pathlib import Path

from fracbit.checkpoint.place import GGUF
from fracbit.checkpoint.source import TensorInfo
from fracbit.errors import SourceError

MADE = "fracbit-"
"""Begins the names of folders that this process makes."""
MISTRAL = "consolidated*.safetensors"


def folder_of(path: Path, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder with the config and tokenizer of the model at a path. Raises `SourceError`."""
    file = path if path.is_file() else _only_gguf(path)
    if file is not None:
        from fracbit.checkpoint.formats.gguf import unpacked

        return unpacked(file)
    if (path / "adapter_config.json").is_file():
        from fracbit.checkpoint.formats.lora import adapter_folder, base_of

        base = base_of(path)
        return path if base is None else adapter_folder(path, base, revision, trust_remote_code)
    return path


def weights_of(folder: Path) -> list[Path]:
    """The file with the weights of a folder that this process made; none for other folders."""
    if not folder.name.startswith(MADE):
        return []
    from fracbit.checkpoint.formats.gguf import weights_of

    file = weights_of(folder)
    return [] if file is None else [file]


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that is no safetensors file, as they lie there; none for a safetensors file."""
    if path.suffix != GGUF:
        return {}
    from fracbit.checkpoint.formats.gguf import stored_tensors

    return stored_tensors(path)


def check_names(folder: Path) -> None:
    """Refuse a folder whose weights have only Mistral's own names. Raises `SourceError`."""
    own = sorted(path.name for path in folder.glob(MISTRAL))
    if own and len(own) == len(list(folder.glob("*.safetensors"))):
        raise SourceError(
            f"{folder} holds a model in Mistral's own form ({own[0]}, params.json), whose tensors have other names and another "
            "order of rows; use the files model-*.safetensors of the same release, or convert it with transformers' script "
            "convert_mistral_weights_to_hf.py"
        )


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights. Raises `SourceError` where there are several."""
    files = sorted(folder.glob(f"*{GGUF}"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        raise SourceError(
            f"{folder} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:3])}); name one of them"
        )
    return files[0]
