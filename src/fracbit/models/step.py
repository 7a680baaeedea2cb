"""`Decoder`: a loaded model's decode step in one native call a token, for every model type that has a blueprint.

The model itself reads the prompt; the tokens after it are read one by one, without Python between the layers. `obstacle` says
why a model cannot be run this way; it then runs layer by layer, as transformers runs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fracbit.errors import KernelError
from fracbit.kernels import Tables
from fracbit.models.quant_linear import QuantLinear
from fracbit.models.step_compiler import Obstacle, StepCompiler, check
from fracbit.models.store_cache import LEAST_ROOM, StoreCache


def obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take the native step, in a few words; None when it can."""
    try:
        check(model)
        StepCompiler(model)
    except Obstacle as reason:
        return str(reason)
    return None


class Decoder:
    """The decode step of a model without an `obstacle`. Raises `KernelError` for one that has it.

    Made in milliseconds; holds the model's own bytes, so the model must stay as it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            check(model)
            made = StepCompiler(model)
        except Obstacle as reason:
            raise KernelError(f"this model has no native decode step: {reason}") from None
        self._program, self._made = made.program, made
        self._tables: tuple[int, Tables] = (0, Tables())
        self._watched = [tensor for tensor in made.watched if not tensor.is_inference()]
        self._versions = self._seen()
        self._layers = made.packed
        self._read = self._reading()

    def advance(self, tokens: Tensor, pads: Tensor, cache: StoreCache) -> Tensor:
        """Read `tokens` [batch] after what `cache` holds, which is at least one token; fp32 logits [batch, vocabulary].

        `pads` [batch]: positions at the start of each sequence that are masked. Raises `KernelError` when something does not
        fit, or when the model was changed since.
        """
        held = cache.held
        if cache.data is None:
            raise KernelError("the cache is empty; let the model read the prompt first")
        changed = self._seen() != self._versions or self._reading() != self._read
        if changed or any(layer.ready() is not held for layer, held in self._layers):
            raise KernelError("the model was changed after its decode step was made; make the step again")
        cache.make_room(cache.part(0, 0), held + 1)
        logits = self._program.advance(
            cache.data, held, tokens.contiguous(), pads, tables=self._at(int(cache.get_seq_length()) + 1), older=cache.older
        )  # fmt: skip  # [batch, vocabulary]
        cache.added(1)
        return logits

    def _at(self, positions: int) -> Tables:
        """Tables of at least so many positions."""
        if self._tables[0] < positions:
            room = max(LEAST_ROOM, 1 << (positions - 1).bit_length())
            self._tables = room, self._made.tables(room)
        return self._tables[1]

    def _reading(self) -> list[tuple[Any, ...]]:
        """How each packed layer reads its inputs."""
        return [(layer.inputs, layer.rotated) for layer, _ in self._layers if isinstance(layer, QuantLinear)]

    def _seen(self) -> list[int]:
        return [number for tensor in self._watched for number in (tensor._version, tensor.data_ptr())]
