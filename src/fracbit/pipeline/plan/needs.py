"""Memory, disk and time that the run of a plan will need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fracbit.checkpoint.output import SHARD_BYTES
from fracbit.checkpoint.source import tensor_hash
from fracbit.pipeline.plan.problem import Problem
from fracbit.pipeline.study.weights import Weights
from fracbit.quantizers import nearest
from fracbit.records.allocation import Allocation

PROCESS_BYTES = 450 << 20  # Python, torch and transformers, resident before any tensor
TIMED = 1 << 20  # weights of a layer that a scheme is timed on
REPEATS = 5
PATIENCE = 1.0  # seconds


@dataclass(frozen=True)
class Needs:
    """What the run itself will take: resident memory, disk and time."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def needs_of(problem: Problem, allocation: Allocation) -> Needs:
    """Memory, disk and time of quantizing as planned; the time does not include writing to disk.

    Each scheme is timed on a piece of its first layer. Hashing, which a second thread does, is timed too.
    """
    shapes = {name: shape for unit in problem.units for name, shape in unit.shapes.items()}
    largest = max(out * width for out, width in shapes.values())
    file_bytes = problem.file_bytes(allocation.schemes)
    seconds = max(_rounding_seconds(problem, allocation), _hashing_seconds(problem))
    # A tensor as read and as fp32, its codes before packing and their temporaries, and the shard that is being filled.
    memory = PROCESS_BYTES + 16 * largest + min(SHARD_BYTES, file_bytes)
    return Needs(memory, file_bytes, seconds)


def _rounding_seconds(problem: Problem, allocation: Allocation) -> float:
    total = 0.0
    for scheme in dict.fromkeys(allocation.schemes.values()):
        if scheme is None:
            continue
        mine = [name for name, given in allocation.schemes.items() if given == scheme]
        layers = [problem.weights.layers[name] for name in mine]
        piece = _piece(problem.weights, mine[0])
        took = _seconds(partial(nearest(search=False), piece, scheme, None))
        total += took * sum(layer.out * layer.width for layer in layers) / piece.numel()
    return total


def _hashing_seconds(problem: Problem) -> float:
    piece = _piece(problem.weights, problem.units[0].own[0])
    per_byte = _seconds(partial(tensor_hash, piece)) / (piece.numel() * piece.element_size())
    return per_byte * problem.opened.source.bytes


def _piece(weights: Weights, name: str) -> Tensor:
    """The first rows of a layer, about `TIMED` weights: [rows, in]."""
    layer = weights.layers[name]
    return weights.rows(name, (slice(0, min(layer.out, max(1, TIMED // layer.width))),))


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes: the least of `REPEATS` runs, or of fewer runs if they take long."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < PATIENCE:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
