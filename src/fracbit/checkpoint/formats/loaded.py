"""A model of plain transformers with decoded weights: the model's own skeleton, filled a few tensors at a time."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from fracbit.checkpoint.complete import check_missing
from fracbit.checkpoint.formats.codes import config_type
from fracbit.checkpoint.opened import check_weight_types, model_config, opened_source
from fracbit.checkpoint.source import FLOATS, Source, read_tensor
from fracbit.errors import SourceError
from fracbit.models.install import materialize

TOGETHER = 32  # tensors that are in memory twice


def load_decoded(
    source: Source, dtype: torch.dtype | str, device: str | torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a source whose tensors are decoded while they are read, with mixtures of experts as linears.

    `dtype` "auto" is that of its config. Raises `SourceError` for tensors that are missing or do not fit.
    """
    if device == "auto":
        raise SourceError(
            f"{source.name} is decoded while it is loaded ({source.decoded}), which cannot be spread over devices; name "
            "one, such as cpu or cuda"
        )
    check_weight_types(source)
    opened = opened_source(source, model_config(source, trust_remote_code), trust_remote_code)
    model, places = opened.model, opened.origins
    check_missing(source.name, places.missing, SourceError)
    kind = FLOATS[config_type(source.config)] if dtype == "auto" else dtype
    wanted: torch.dtype = getattr(torch, kind) if isinstance(kind, str) else kind
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    names = [name for name in places.tensors if name not in tied]
    groups = [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]
    for group in [[name for name in places.tensors if name in tied], *groups]:
        parts = {name: (places.tensors[name], places.tensors[name].names) for name in group}
        some = {
            name: place.read([read_tensor(opened.source, each) for each in stored])
            for name, (place, stored) in parts.items()
        }
        materialize(model, some, wanted, device, partial=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    check_missing(source.name, left, SourceError)
    model.config.dtype = wanted
    model.config.name_or_path = model.name_or_path = source.name
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.requires_grad_(True)  # as transformers leaves what it loads
    return model.eval()  # type: ignore[no-any-return]
