"""The way of text through a model: whole, with ids for encoder and decoder alike, or through the part that reads text.

Some models that see or hear cannot be called with ids alone (BLIP-2, Voxtral); the language model within them can. What it then
leaves out (attention to images) sees no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextWay:
    """`part`: path of the module that takes the ids, "" for the model itself; `both`: its decoder takes them too."""

    part: str = ""
    both: bool = False

    def run(self, model: PreTrainedModel, ids: torch.Tensor) -> Any:
        """The output of the part for ids int64 [samples, tokens]."""
        part = model.get_submodule(self.part)
        ids = ids.to(held_on(part))  # [samples, tokens]
        given = {"input_ids": ids, "use_cache": False} | ({"decoder_input_ids": ids} if self.both else {})
        return part(**given)

    def logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Logits [samples, tokens, vocabulary], by the model's head where the part has none."""
        found = self.run(model, ids)
        if hasattr(found, "logits"):
            logits: torch.Tensor = found.logits
            return logits
        head: Any = model.get_output_embeddings()
        return head(found[0])  # type: ignore[no-any-return]


WHOLE = TextWay()


def held_on(part: nn.Module) -> torch.device:
    """Where the tensors of a model are that hold values; its blocks may have none."""
    held = (tensor.device for tensor in (*part.parameters(), *part.buffers()) if not tensor.is_meta)
    return next(held, torch.device("cpu"))


def ways_through(model: PreTrainedModel, stack: list[nn.Module]) -> Iterator[TextWay]:
    """Ways that may lead text through the blocks of `stack`, the most complete first."""
    yield WHOLE
    if model.config.is_encoder_decoder:
        yield TextWay(both=True)
    for path, part in model.named_modules():
        if path and isinstance(part, PreTrainedModel) and any(each is stack[0] for each in part.modules()):
            yield TextWay(path)
