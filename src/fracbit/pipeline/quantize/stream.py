"""THE LOOP for data-free runs: read a tensor, quantize it, write its shard. The model is never whole in memory.

    recipe -> source + skeleton -> schedule -> for each shard: read, quantize, write -> manifest, card, config

One thread reads and hashes the next tensor while this one quantizes with torch's threads. What is in memory is one shard of
the output, one tensor being quantized and one being read.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from fracbit.checkpoint.format import stored_layer, tensor_names
from fracbit.checkpoint.output import Output, open_output
from fracbit.checkpoint.source import Source, open_source, read_tensor, tensor_hash
from fracbit.errors import OutputError, RecipeError, SourceError, WeightError
from fracbit.models.skeleton import Origin, skeleton
from fracbit.pipeline.quantize.manifest import finish
from fracbit.pipeline.quantize.schedule import SHARD_BYTES, Item, make_schedule
from fracbit.quantizers import Quantizer, quantizer
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe

PIECE = 1 << 22  # weights that are checked at a time


@dataclass(frozen=True)
class Result:
    """What a run made: the folder and what it costs. Bits are counted from the stored bytes.

    `bits_per_weight` over the quantized layers, `bits_per_parameter` over everything, `bytes` of all weight files.
    """

    output: str
    bits_per_weight: float | None
    bits_per_parameter: float
    bytes: int
    source_bytes: int
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...]


def run(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model as `recipe` says into the folder `output`, without calibration data.

    Raises a `FracbitError`: `SourceError`, `RecipeError`, `SchemeError`, `WeightError` (layer named), `OutputError`.
    """
    started = time.perf_counter()
    folder = Path(output).expanduser()
    fill = quantizer(recipe.quantizer, recipe.search)
    _data_free(recipe, fill)
    source = open_source(recipe.model, recipe.revision, recipe.trust_remote_code)
    refuse(source, folder)
    model = skeleton(
        model_config(source, recipe.trust_remote_code), trust_remote_code=recipe.trust_remote_code
    )
    schedule = make_schedule(recipe, source, model, shard_bytes)
    show = progress or (lambda what, done, total: None)
    done = 0
    with open_output(folder, schedule.key, schedule.bytes, overwrite, resume) as target:
        for shard, items in schedule.shards.items():
            if target.record(shard) is None:
                _write_shard(
                    target, shard, items, source, fill, partial(_show_from, show, done, source.bytes)
                )
            done += sum(_source_bytes(source, item) for item in items)
            show(shard, done, source.bytes)
        totals = finish(target, recipe, source, schedule, model)
    return Result(str(folder), **totals, seconds=time.perf_counter() - started, peak_rss_bytes=peak_rss())


def _show_from(show: Progress, before: int, total: int, name: str, size: int) -> None:
    show(name, before + size, total)


def _write_shard(
    target: Output,
    shard: str,
    items: Iterable[Item],
    source: Source,
    fill: Quantizer,
    show: Callable[[str, int], None],
) -> None:
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    size = 0
    for item, tensor, digest in _prefetch(source, items):
        record["hashes"][item.origin.name] = digest
        if item.layer is None or item.stored is None:
            if not item.unused:
                check_finite(item.name, tensor)
            tensors[item.name] = tensor
        else:
            named, record["layers"][item.layer.name] = quantize_item(item, tensor, fill)
            tensors |= named
        size += _source_bytes(source, item)
        show(item.name, size)
    target.write_shard(shard, tensors, record)


def quantize_item(item: Item, tensor: Tensor, fill: Quantizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of one layer and what is recorded of it. Raises `WeightError` naming the layer."""
    assert item.layer is not None
    assert item.stored is not None
    weight = (tensor.T if item.layer.transposed else tensor).float()
    try:
        quantized = fill(weight, item.stored.scheme, None)
    except WeightError as error:
        raise WeightError(f"layer {item.layer.name}: {error}") from error
    stored = stored_layer(quantized.packed, item.stored.kind)
    facts = {
        "loss": quantized.loss,
        "bits_per_weight": stored.bits_per_weight,
        "notes": list(quantized.notes),
    }
    return tensor_names(item.layer.name, quantized.packed), facts


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `WeightError` when a tensor that stays float holds NaN or Inf; looked at in pieces, as it may be large."""
    if not tensor.is_floating_point():
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in tensor.reshape(-1).split(PIECE))
    if bad:
        raise WeightError(
            f"tensor {name}: {bad} of {tensor.numel()} weights are NaN or Inf; mend the source first"
        )


def _prefetch(source: Source, items: Iterable[Item]) -> Iterator[tuple[Item, Tensor, str]]:
    """Tensors in order with their hashes, the next one being read while this one is used."""

    def read(origin: Origin) -> tuple[Tensor, str]:
        whole = read_tensor(source, origin.name)
        return origin.read(whole), tensor_hash(whole)

    with ThreadPoolExecutor(1) as reader:
        waiting: tuple[Item, Future[tuple[Tensor, str]]] | None = None
        for item in items:
            following = (item, reader.submit(read, item.origin))
            if waiting is not None:
                yield waiting[0], *waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], *waiting[1].result()


def model_config(source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Transformers' config of a source. Raises `SourceError` when transformers does not know it or is not to trust it."""
    if not trust_remote_code and "auto_map" in source.config and _unknown(source):
        raise SourceError(f"{source.name} runs code of its own; if you trust it, pass --trust-remote-code")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise SourceError(f"{source.name} is not a model that transformers knows: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _unknown(source: Source) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return source.config.get("model_type") not in CONFIG_MAPPING


def refuse(source: Source, folder: Path) -> None:
    """Stop before any work where the output is the model itself, or the model is quantized already."""
    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise OutputError(f"{folder} is the model itself; name another folder for the output")
    quantization = source.config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown method")
            if isinstance(quantization, dict)
            else quantization
        )
        raise SourceError(
            f"{source.name} is already quantized ({method}); start from the float model, rounding twice loses twice"
        )


def _data_free(recipe: Recipe, fill: Quantizer) -> None:
    if fill.needs:
        raise RecipeError(
            f"quantizer {recipe.quantizer} looks at data; give it texts (--calibration, or [calibration] in the "
            "recipe), or use rtn"
        )
    if recipe.calibration is not None:
        raise RecipeError(
            "this run reads no data; a recipe with calibration is for fracbit.pipeline.quantize.calibrated.run_calibrated"
        )


def _source_bytes(source: Source, item: Item) -> int:
    return source.tensors[item.origin.name].bytes


def peak_rss() -> int:
    """The most memory this process ever had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
