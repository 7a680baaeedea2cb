"""Memory, disk and time that a run will need: the one estimator, which plans, presets and the command line ask.

A calibrated run is tried on one of its blocks (pipeline/quantize/trial.py), a run without data on a piece of a layer for each
scheme.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import SHARD_BYTES
from fracbit.checkpoint.source import tensor_hash
from fracbit.errors import FracbitError
from fracbit.pipeline.quantize.schedule import Item, LayerItem
from fracbit.pipeline.quantize.trial import measure_needs
from fracbit.pipeline.quantize.work import Work, prepare
from fracbit.quantizers import nearest
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs
from fracbit.records.scheme import Scheme

PROCESS_BYTES = 450 << 20  # Python, torch and transformers, resident before any tensor
TIMED = 1 << 20  # weights of a layer that a scheme is timed on
REPEATS = 5
PATIENCE = 1.0  # seconds


def needs_or_why(recipe: Recipe, opened: Opened, device: str | torch.device = "cpu") -> Needs | str:
    """`needs_of`, or why it cannot be told: a trial reads random ids and may fail where the run does not."""
    try:
        return needs_of(recipe, opened, device)
    except (FracbitError, RuntimeError, ValueError) as error:
        return f"time and memory could not be measured: {error}"


def needs_of(recipe: Recipe, opened: Opened, device: str | torch.device = "cpu") -> Needs:
    """What quantizing by `recipe` will take on this machine. Raises as the run."""
    if recipe.calibration is not None:
        return measure_needs(recipe, opened, device)
    work = prepare(recipe, opened, device=device)
    items = [item for shard in work.schedule.shards.values() for item in shard if isinstance(item, LayerItem)]
    seconds = max(_rounding_seconds(work, items), _hashing_seconds(work))
    # A tensor as read and as fp32, its codes before packing and their temporaries, and the shard that is being filled.
    largest = max((item.layer.out * item.layer.width for item in items), default=0)
    disk = work.schedule.bytes
    return Needs(PROCESS_BYTES + 16 * largest + min(SHARD_BYTES, disk), disk, seconds)


def _rounding_seconds(work: Work, items: Iterable[LayerItem]) -> float:
    """Each scheme is timed on a piece of its first layer."""
    weights, first = Counter[Scheme](), dict[Scheme, LayerItem]()
    for item in items:
        weights[item.stored.scheme] += item.layer.out * item.layer.width
        first.setdefault(item.stored.scheme, item)
    total, fill = 0.0, nearest(work.method.fill.search)
    for scheme, item in first.items():
        piece = _piece(work, item, item.layer.transposed)  # [rows, in]
        total += _seconds(partial(fill, piece, scheme)) * weights[scheme] / piece.numel()
    return total


def _hashing_seconds(work: Work) -> float:
    """What a second thread does meanwhile."""
    piece = torch.zeros(TIMED, dtype=torch.uint8)  # what the bytes are does not matter
    return _seconds(partial(tensor_hash, piece)) / len(piece) * work.opened.source.bytes


def _piece(work: Work, item: Item, transposed: bool) -> Tensor:
    """The first rows of a tensor, about `TIMED` weights: [rows, in]."""
    tensor = work.reader.read(item)[0]
    tensor = tensor.T if transposed else tensor
    tensor = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.view(1, 1)  # [out, in]
    return tensor[: max(1, TIMED // tensor.shape[1])].contiguous()


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes: the least of `REPEATS` runs, or of fewer runs if they take long."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < PATIENCE:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
