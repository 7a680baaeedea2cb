"""How llama.cpp's tensors differ from a model's: rows in another order, and 1 added to some norms.

transformers undoes both when it reads a file, tensor by tensor. Here the numbers of rows go through what it does, and come out
in the order in which the file must hold them. So no family is described twice; only Falcon, which transformers reads as it is,
has its order here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fracbit.errors import FormatError

Reading: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""What is done to a tensor of a file when it is read."""


@dataclass(frozen=True, eq=False)
class Change:
    """What happens to a tensor [out, in] or [out] on its way into a file.

    `order` int64 [out]: which row stands at each place, None where all stay. `shift`: added to every value.
    """

    order: Tensor | None = None
    shift: float = 0.0

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [out, ...], or of its codes, in the order of the file."""
        return tensor if self.order is None else tensor[self.order]

    def rows_back(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [out, ...] of the file in the order of the model."""
        return tensor if self.order is None else tensor[self.order.argsort()]

    def values(self, tensor: Tensor) -> Tensor:
        """A float tensor [out, ...] as the file holds it, fp32 where it is shifted."""
        return self.rows(tensor) if self.shift == 0 else self.rows(tensor).float() + self.shift


@dataclass(frozen=True, eq=False)
class StoredBlocks:
    """A layer as blocks of a type of ggml: `kind`, its name, and `rows` uint8 [out, bytes] in the order of the file.

    `factor`: what all weights are multiplied by.
    """

    kind: str
    rows: Tensor
    change: Change
    factor: float = 1.0


def reading(architecture: str, settings: Mapping[str, Any], inside: str) -> Reading:
    """What transformers does to the tensor called `inside` in a file of an architecture of llama.cpp; `settings`: a config."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    worker = kind(config=settings)

    def process(values: np.ndarray) -> np.ndarray:
        made: np.ndarray = worker.process(
            values, inside, tensor_key_mapping=None, parsed_parameters={"tensors": {}}
        ).weights
        return made

    return process


def change_of(process: Reading, shape: tuple[int, ...], inside: str) -> Change:
    """What happens to a tensor of this `shape` [out, in] or [out] on its way into a file, given what happens on the way back.

    Raises `FormatError`, naming it by `inside`, where something else happens to it.
    """
    places = _through(process, shape)  # [out]
    shift = float(places.min())
    places = (places - shift).astype(np.int64)
    if not np.array_equal(np.sort(places), np.arange(shape[0])):
        raise FormatError(f"transformers changes {inside} in a way that cannot be undone")
    order = np.argsort(places)
    same = np.array_equal(order, np.arange(shape[0]))
    return Change(None if same else torch.from_numpy(order), -shift)


def _through(process: Reading, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of the rows [out] after `process`, turned or not; one column is enough, unless it counts the columns."""
    numbers = np.arange(shape[0], dtype=np.float64).reshape(-1, *(1,) * (len(shape) - 1))  # [out] or [out, 1]
    try:
        return process(numbers).reshape(-1)
    except ValueError:  # a shape that a matrix of one column cannot have
        return process(np.broadcast_to(numbers, shape)).reshape(shape[0], -1)[:, 0]


def falcon_rows(heads: int, groups: int, out: int) -> Tensor:
    """Falcon's rows [out] as a file has them: all of q, of k, of v. In a model a group has heads of q, then k, then v."""
    rows = torch.arange(out).view(groups, heads // groups + 2, -1)  # [groups, heads of a group, head size]
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])  # [out]
