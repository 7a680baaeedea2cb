"""What a run bought: its checkpoint beside the float model on a little held-out text, in the memory of one block.

embed both -> for each block: the float one from the source, the stored one decoded, each on states of its own -> predictions
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.export.exporter import StoredModel, open_stored
from fracbit.checkpoint.export.float import decoded
from fracbit.checkpoint.opened import Opened, open_float
from fracbit.data import Samples
from fracbit.errors import FracbitError
from fracbit.evaluation.divergence import distribution, token_divergence
from fracbit.evaluation.loss import target_nll
from fracbit.models.blocks import blocks, is_transposed
from fracbit.models.family import Family
from fracbit.models.install import materialize, release
from fracbit.models.origin import Origin, block_places, origins
from fracbit.models.walk import Hidden, advance, embed, head_batches
from fracbit.pipeline.improve.twins import block_tensors, outer_tensors
from fracbit.pipeline.quantize.block import rounded_inputs
from fracbit.pipeline.quantize.rotate import turned_inputs
from fracbit.pipeline.study.texts import reader_of
from fracbit.records.progress import Progress, silent
from fracbit.records.recipe import Recipe
from fracbit.records.run import Bought

TEXT = "builtin:held-out"
TOKENS, LENGTH = 2048, 256  # at most, and of a sample
PATIENCE = 60.0  # seconds that looking may always take; beyond, a tenth of the run
SHARE = 0.1


def bought(
    recipe: Recipe, folder: Path, took: float, text: str | None = None, show: Progress | None = None
) -> Bought | str:
    """The predictions of the checkpoint in `folder` beside the float model's, or why they are not known.

    `recipe` made it in `took` seconds. `text`: held-out text; None: the part of the builtin set that is to judge by.
    """
    try:
        opened, stored = (
            open_float(recipe.model, recipe.revision, recipe.trust_remote_code),
            open_stored(folder),
        )
        samples = _samples(opened, text or TEXT)
        return _walked(opened, _Stored(stored), samples, took, show=show or silent)
    except FracbitError as error:
        return f"not compared with the float model: {error}"


@dataclass(frozen=True, eq=False)
class _Stored:
    """A checkpoint of fracbit whose tensors are read as floats."""

    stored: StoredModel

    @property
    def model(self) -> PreTrainedModel:
        return self.stored.model

    def tensors(self, places: Mapping[str, Origin]) -> dict[str, Tensor]:
        """The tensors at some places."""
        return {
            name: place.read([self._read(part) for part in place.names]) for name, place in places.items()
        }

    def _read(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.stored.disk:
            return self.stored.tensor(name).float()
        weight = decoded(self.stored, layer, torch.float32)  # [out, in]
        turned = self.stored.disk[layer].kind == "linear" and is_transposed(self.model.get_submodule(layer))
        return weight.T if turned else weight

    def names(self) -> list[str]:
        """The names of all tensors, as of a float checkpoint."""
        return [*self.stored.rest, *(f"{name}.weight" for name in self.stored.disk)]


def _samples(opened: Opened, text: str) -> Samples:
    """Samples of the text, as many as it has up to `TOKENS` ids. Raises `DataError`."""
    reader = reader_of(opened)
    limit = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    held = reader.documents(text)
    length = min(LENGTH, limit, held.count)
    return reader.samples(text, samples=max(1, min(TOKENS, held.count) // length), length=length)


def _walked(opened: Opened, coded: _Stored, samples: Samples, took: float, *, show: Progress) -> Bought | str:
    family, begun = opened.family, time.perf_counter()
    floats, stack = blocks(opened.model, family), blocks(coded.model, family)
    places = origins(coded.model, coded.names())
    paths = tuple(f"{path}." for path, _ in stack)
    materialize(opened.model, outer_tensors(opened), torch.float32, partial=True)
    outside = {name: place for name, place in places.tensors.items() if not name.startswith(paths)}
    materialize(coded.model, coded.tensors(outside), torch.float32, partial=True)
    exact, hidden = (
        embed(model, family, samples.ids, batch=len(samples.ids)) for model in (opened.model, coded.model)
    )
    for number, ((path, block), (_, twin)) in enumerate(zip(floats, stack, strict=True)):
        exact = _through(block, block_tensors(opened, path), exact)
        inside = coded.tensors(block_places(coded.model, places, path))
        layers = {name: layer for name, layer in coded.stored.disk.items() if name.startswith(f"{path}.")}
        rounding = {
            name[len(path) + 1 :]: layer.inputs for name, layer in layers.items() if layer.inputs is not None
        }
        turned = [name[len(path) + 1 :] for name, layer in layers.items() if layer.rotated]
        with turned_inputs(twin, turned), rounded_inputs(twin, rounding):
            hidden = _through(twin, inside, hidden)
        show("comparing with the float model", number + 1, len(stack) + 1)
        expected = (time.perf_counter() - begun) / (number + 1) * len(stack)
        if expected > max(PATIENCE, SHARE * took):
            return (
                f"not compared with the float model, which would take {expected:.0f} s; fracbit eval does it"
            )
    return _compared(opened, coded, samples, exact=exact, hidden=hidden)


def _through(block: nn.Module, tensors: dict[str, Tensor], hidden: Hidden) -> Hidden:
    """Through a block that is in memory only meanwhile."""
    materialize(block, tensors, torch.float32)
    hidden = advance(block, hidden, hidden.states)
    release(block)
    return hidden


def _compared(opened: Opened, coded: _Stored, samples: Samples, exact: Hidden, hidden: Hidden) -> Bought:
    """Losses of both, and the divergence between their predictions of every next id."""
    family: Family = opened.family
    sums, away, same, count = [0.0, 0.0], 0.0, 0, 0
    pairs = zip(
        head_batches(opened.model, family, exact), head_batches(coded.model, family, hidden), strict=True
    )
    for batch, both in zip(exact.batches, pairs, strict=True):
        for ids, one, other in zip(samples.ids[batch.start : batch.stop], *both, strict=True):
            right = distribution(one[:-1])  # [tokens - 1, vocabulary]
            logs = torch.log_softmax(other[:-1].float(), dim=1)
            for index, each in enumerate((right.logs, logs)):
                sums[index] += float(target_nll(each, ids[1:]).double().sum())
            away += float(token_divergence(right, logs).double().sum())
            same += int((right.top == logs.argmax(1)).sum())
            count += len(ids) - 1
    divergence = away / count if math.isfinite(away) else math.inf
    exact_nll, nll = (total / count for total in sums)
    text = str(samples.sources[0]["source"])
    return Bought(text, count, float_nll=exact_nll, nll=nll, kl=divergence, agreement=same / count)
