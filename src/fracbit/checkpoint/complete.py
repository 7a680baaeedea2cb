"""What is loaded is what was stored: every tensor that the model needs came from the files, in its shape and with sane values.

transformers fills a tensor that the files lack with random numbers and warns; a cut or foreign file would load. Here these are
errors, whoever asks transformers to load. Bits that flipped and still make sense are found by hashes alone (verify.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fracbit.checkpoint.folder import MANIFEST
from fracbit.checkpoint.format import StoredLayer, tensor_name
from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.checkpoint.source import TYPE_NAMES, TensorInfo
from fracbit.errors import FormatError, FracbitError
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear
from fracbit.numerics.packed import check_values, part_shapes
from fracbit.records.run import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 3  # names in a message
_COUNTS = "_adjust_missing_and_unexpected_keys"


def check_missing(name: str, missing: Collection[str], error: type[FracbitError]) -> None:
    """Raises `error` where tensors of the model `name` are `missing` from its files."""
    if missing:
        raise error(
            f"{name} lacks {_tensors(missing)} of its model; it is damaged or of another model class: copy or fetch it again"
        )


def check_headers(name: str, layers: Mapping[str, StoredLayer], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises `FormatError` for a tensor of a quantized layer whose type or shape is not that of its scheme."""
    for layer, stored in layers.items():
        for part, (dtypes, size) in part_shapes(stored.scheme, stored.shape, stored.outliers).items():
            found = tensors.get(tensor_name(layer, part))
            shape = (torch.Size(size).numel(),) if part == "codes" else tuple(size)
            allowed = [TYPE_NAMES[dtype] for dtype in dtypes]
            if found is not None and (found.shape != shape or found.dtype not in allowed):
                raise FormatError(
                    f"{name}: {tensor_name(layer, part)} is {found.dtype} {list(found.shape)}, and its scheme {stored.scheme} "
                    f"needs {' or '.join(allowed)} {list(shape)}; copy or fetch the checkpoint again"
                )


def check_listed(name: str, listed: Mapping[str, StoredTensor], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises `FormatError` where the files hold other tensors than the manifest lists, or of another type or shape."""
    if not listed:
        return  # fracbit 0.1 listed none
    check_missing(name, listed.keys() - tensors.keys(), FormatError)
    foreign = tensors.keys() - listed.keys()
    if foreign:
        raise FormatError(
            f"{name} holds {_tensors(foreign)} that its {MANIFEST} does not list; remove what was added, or copy or fetch the "
            "checkpoint again"
        )
    for tensor, stored in listed.items():
        found = tensors[tensor]
        if (found.dtype, found.shape) != (stored.dtype, stored.shape):
            raise FormatError(
                f"{name}: {tensor} is {found.dtype} {list(found.shape)}, and its {MANIFEST} says {stored.dtype} "
                f"{list(stored.shape)}; copy or fetch the checkpoint again"
            )


def check_packed(name: str, model: nn.Module) -> None:
    """Raises `FormatError` naming a layer whose packed weight no quantizer makes. Layers that are on the disk are left out."""
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding) and not module.get_buffer("weight").is_meta:
            try:
                check_values(module.packed)
            except FormatError as error:
                raise FormatError(
                    f"{name}: layer {path}: {error}; copy or fetch the checkpoint again"
                ) from None


def listed_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that the manifest of a checkpoint lists; none where it lists none. Raises `FormatError`."""
    tensors = read_manifest(folder).get("tensors", {})
    try:
        return {name: StoredTensor.from_json(tensor) for name, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{folder / MANIFEST}: its list of tensors cannot be read: {type(error).__name__}: {error}"
        ) from error


def when_loaded(model: PreTrainedModel, check: Callable[[set[str]], None]) -> None:
    """Call `check` with the names of missing tensors when transformers has filled `model`, whoever asked it to.

    transformers tells them only to callers of `output_loading_info`; where it counts them is the one place that sees them all.
    """
    count = getattr(model, _COUNTS)

    def counted(info: Any) -> None:
        delattr(model, _COUNTS)
        count(info)
        check(set(info.missing_keys))

    setattr(model, _COUNTS, counted)


def _tensors(names: Collection[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{'a tensor' if len(found) == 1 else f'{len(found)} tensors'} ({', '.join(found[:SHOWN])}{more})"
