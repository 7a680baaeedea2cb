"""`Study`: the float model of an opened checkpoint, loaded when it is first needed, and texts as it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples
from fracbit.pipeline.study.float_model import FloatModel, load_float
from fracbit.pipeline.study.texts import LENGTH, SAMPLES, TextReader, reader_of
from fracbit.records.progress import Progress


@dataclass(frozen=True, eq=False)
class Study:
    """What scores, contests and lenses look at. `seed` is that of all samples."""

    opened: Opened
    seed: int = 0
    progress: Progress | None = None

    @cached_property
    def subject(self) -> FloatModel:
        """The model in memory. Raises `SourceError`."""
        return load_float(self.opened)

    @cached_property
    def reader(self) -> TextReader:
        """How the model reads text; the model itself is not loaded for that. Raises `SourceError`."""
        return reader_of(self.opened)

    def held_out(self, text: str, samples: int = SAMPLES, length: int = LENGTH) -> Samples:
        """Samples of a text that losses are measured on. Raises `DataError`, also for text that the model writes itself."""
        return self.reader.samples(text, samples=samples, length=length, seed=self.seed)

    def seen(self, texts: str | Sequence[str], samples: int = SAMPLES, length: int = LENGTH) -> Samples:
        """Samples of the text or texts that a score reads; the model itself writes `generated` text. Raises `DataError`."""
        return self.reader.samples(
            texts,
            samples=samples,
            length=length,
            seed=self.seed,
            model=lambda: self.subject.model,
            progress=self.progress,
        )
