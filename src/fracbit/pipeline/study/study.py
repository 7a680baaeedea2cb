"""`Study`: the float model of an opened checkpoint, loaded when it is first needed, and texts read by its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples
from fracbit.pipeline.study.float_model import FloatModel, float_model_of, load_float
from fracbit.pipeline.study.texts import TextReader, calibration_samples, reader_of, writer_of
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.spending import LENGTH, SAMPLES


@dataclass(frozen=True, eq=False)
class Study:
    """The model and the texts for scores, contests and lenses.

    `seed`: of all samples; `device`: where a run that follows writes `generated` text, and so where it is written for it.
    """

    opened: Opened
    seed: int = 0
    progress: Progress | None = None
    device: str = "cpu"

    @cached_property
    def float_model(self) -> FloatModel:
        """The model in memory, on the CPU and in float32. Raises `SourceError`."""
        writer: PreTrainedModel | None = vars(self).pop("writer", None)
        if writer is None or writer.dtype != torch.float32:
            return load_float(self.opened)
        return float_model_of(writer.to(torch.device("cpu")))  # type: ignore[arg-type]

    @cached_property
    def writer(self) -> PreTrainedModel:
        """The model as it is stored, on `device`; `float_model` takes it over where it is stored in float32."""
        return writer_of(self.opened, self.device)

    @cached_property
    def reader(self) -> TextReader:
        """How the model reads text; the model itself is not loaded for that. Raises `SourceError`."""
        return reader_of(self.opened)

    def held_out(self, text: str, samples: int = SAMPLES, length: int = LENGTH) -> Samples:
        """Samples of a text that losses are measured on. Raises `DataError`, also for `generated` text."""
        return self.reader.samples(text, samples=samples, length=length, seed=self.seed)

    def calibration(self, recipe: Recipe) -> Samples:
        """The samples of the recipe's calibration, as the run that follows draws them. Raises `DataError`."""
        return calibration_samples(recipe, self.opened, lambda: self.writer, self.progress)

    def seen(self, texts: str | Sequence[str], samples: int = SAMPLES, length: int = LENGTH) -> Samples:
        """Samples of the text or texts that a score reads; the model itself writes `generated` text. Raises `DataError`."""
        return self.reader.samples(
            texts,
            samples=samples,
            length=length,
            seed=self.seed,
            model=lambda: self.float_model.model,
            progress=self.progress,
        )
