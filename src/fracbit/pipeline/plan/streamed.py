"""A float model for scores that look at one block at a time: read from the source as a calibrated run reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import InMemory
from fracbit.data import Samples
from fracbit.pipeline.plan.passes import Streamed
from fracbit.pipeline.quantize.calibrated import embed_source
from fracbit.pipeline.quantize.token_weights import stack_of
from fracbit.pipeline.quantize.work import prepare
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe


def streamed(opened: Opened, ids: Tensor, device: str | torch.device = "cpu") -> Streamed:
    """The model of a source, for `ids` int64 [samples, tokens], in the type that `auto` gives a run. Raises `SourceError`."""
    count, length = ids.shape
    plan = Calibration(texts=("samples that were drawn",), samples=count, length=length)
    recipe = Recipe(
        model=opened.source.name, trust_remote_code=opened.trust_remote_code, calibration=plan, search=False
    )
    samples = Samples(ids, "", seed=0, bos="stored", sources=())
    work = prepare(recipe, opened, device=device, samples=samples)
    return Streamed(weights_on_disk(opened), stack_of(work), ids, lambda: embed_source(work, InMemory()))
