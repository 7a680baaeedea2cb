"""How llama.cpp's tensors differ from a model's: rows in another order, and 1 added to some norms.

transformers undoes both when it reads a file, tensor by tensor. Here the numbers of rows go through what it does, and come out
in the order in which the file must hold them. So no family is described twice; only Falcon, which transformers reads as it is,
has its order here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fracbit.checkpoint.export.gguf.architectures import Architecture
from fracbit.checkpoint.export.gguf.size_keys import HEADS, ModelSettings
from fracbit.checkpoint.formats.gguf import falcon_rows
from fracbit.errors import FormatError

Reading: TypeAlias = Callable[[np.ndarray, str], np.ndarray]
"""What is done to a tensor of a file, by its name, when it is read."""


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

    def values(self, tensor: Tensor) -> Tensor:
        """A float tensor [out, ...] as the file holds it, fp32 where it is shifted."""
        return self.rows(tensor) if self.shift == 0 else self.rows(tensor).float() + self.shift


def change_of(
    architecture: Architecture,
    settings: ModelSettings,
    inside: str,
    shape: tuple[int, ...],
    *,
    transposed: bool = False,
) -> Change:
    """What happens to the tensor called `inside` in the file, of this `shape` [out, in] or [out].

    `transposed`: the model holds it [in, out]. Raises `FormatError` where transformers does something else to it.
    """
    if architecture.groups is not None and ".attn_qkv." in inside:
        return Change(falcon_rows(int(HEADS(settings)), int(architecture.groups(settings)), shape[0]))
    made = _through(_reading(architecture, settings), inside, shape)
    made = made.T if transposed and made.ndim > 1 else made
    places = made.reshape(shape[0], -1)[:, 0]  # [out]
    shift = float(places.min())
    places = (places - shift).astype(np.int64)
    if not np.array_equal(np.sort(places), np.arange(shape[0])):
        raise FormatError(
            f"transformers changes {inside} of a {architecture.name} in a way that format gguf cannot undo; export float, and "
            "convert that folder with convert_hf_to_gguf.py of llama.cpp"
        )
    order = np.argsort(places)
    same = np.array_equal(order, np.arange(shape[0]))
    return Change(None if same else torch.from_numpy(order), -shift)


def _through(process: Reading, inside: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of the rows after what transformers does to them; one column is enough, unless it counts the columns."""
    numbers = np.arange(shape[0], dtype=np.float64).reshape(-1, *(1,) * (len(shape) - 1))  # [out] or [out, 1]
    try:
        return process(numbers, inside)
    except ValueError:  # a shape that a matrix of one column cannot have
        return process(np.broadcast_to(numbers, shape), inside)


def _reading(architecture: Architecture, settings: ModelSettings) -> Reading:
    """What transformers does to a tensor of a file when it reads it."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(architecture.name, TensorProcessor)
    worker = kind(config=settings)

    def process(values: np.ndarray, inside: str) -> np.ndarray:
        found: np.ndarray = worker.process(
            values, inside, tensor_key_mapping=None, parsed_parameters={"tensors": {}}
        ).weights
        return found

    return process
