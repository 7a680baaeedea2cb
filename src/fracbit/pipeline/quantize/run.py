"""From a recipe to a checkpoint: open the source once, prepare, fill every shard with the loop that fits, write the manifest.

    recipe -> Opened -> Work (schedule, samples, method) -> stream_shards or calibrate_shards -> finish -> Result

`fill_shards` is the core: it fills a folder, and also the memory that a sweep evaluates (sweeps/workbench.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fracbit.checkpoint.folder import JOURNAL, finished_run
from fracbit.checkpoint.opened import Opened, open_float
from fracbit.checkpoint.output import SHARD_BYTES, WRITER, Output, Shards, open_output
from fracbit.checkpoint.shards import check_apart
from fracbit.data import Samples
from fracbit.errors import FormatError, OutputError, RecipeError
from fracbit.models.attention import native_attention
from fracbit.pipeline.quantize.calibrated import SPILL_BYTES, calibrate_shards
from fracbit.pipeline.quantize.manifest import finish
from fracbit.pipeline.quantize.ranks import ALONE, Ranks
from fracbit.pipeline.quantize.rotate import needs_untied_head
from fracbit.pipeline.quantize.share import share_of
from fracbit.pipeline.quantize.stream import stream_shards
from fracbit.pipeline.quantize.tried import try_blocks
from fracbit.pipeline.quantize.work import Work, prepare
from fracbit.records.files import named_path
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.resources import peak_rss
from fracbit.records.run import ALLOWED, Result, Totals
from fracbit.records.version import __version__

FINISHED = "already finished: nothing to do"


def write_checkpoint(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    device: str | torch.device = "cpu",
    spill_bytes: int = SPILL_BYTES,
    progress: Progress | None = None,
    opened: Opened | None = None,
    samples: Samples | None = None,
    allow_float: float = ALLOWED,
    ranks: Ranks = ALONE,
) -> Result:
    """Quantize a model as `recipe` says into the folder `output`; `opened`: its source, if it is already open.

    `samples`: those of its calibration, if they have been drawn already. `allow_float`: which share of the blocks' matrices may
    stay float without a warning. `ranks`: the processes that share the run, all of which call this.
    Blocks of a calibrated run are moved to `device` one at a time; everything else stays in memory. With `resume`, a
    finished output of the same run is left as it is. Raises a `FracbitError`.
    """
    if not 0 <= allow_float <= 1:
        raise RecipeError(f"allow_float is a share of the blocks' matrices, 0 to 1; got {allow_float}")
    started = time.perf_counter()
    folder = named_path(output, OutputError)
    opened = opened or open_for(recipe)
    check_apart(folder, opened.source.folder)
    work = prepare(
        recipe,
        opened,
        shard_bytes=shard_bytes,
        device=device,
        samples=samples,
        progress=progress,
        ranks=ranks,
    )
    ranks.agree({"fracbit": __version__, "the run": work.schedule.key, "the output": str(folder.absolute())})
    notes: tuple[str, ...] = (FINISHED,)
    totals = ranks.tell(_finished(folder, work) if resume and not overwrite else None)
    if totals is None:
        untried = try_blocks(opened, work.schedule, calibrated=recipe.calibration is not None)
        with open_shared(work, folder, overwrite=overwrite, resume=resume) as target:
            missed = fill_shards(work, target, spill_bytes)
            ranks.gather(None)  # every shard is written
            made = finish(work, target) if ranks.leads else None
            made = ranks.tell(made)
            assert made is not None
            totals, notes = made
            notes += (*target.notes, *missed, *untried)
    share = share_of(opened, work.schedule)
    return Result(
        **totals.to_json(),
        output=str(folder),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss(),
        share=share,
        notes=(*notes, *share.warning(allow_float)),
    )


@contextmanager
def open_shared(work: Work, folder: Path, *, overwrite: bool, resume: bool) -> Iterator[Output]:
    """The output that all ranks fill, whose lock rank 0 holds. Raises `OutputError`, also where they do not see one folder."""
    ranks, key = work.ranks, work.schedule.key
    with ExitStack() as stack:
        if ranks.leads:
            opening = open_output(
                folder, key, expected_bytes=work.schedule.bytes, overwrite=overwrite, resume=resume
            )
            target = stack.enter_context(opening)
        ranks.gather(None)  # rank 0 has opened it
        if not ranks.leads:
            target = Output(folder)
        held = ranks.gather(_writer(folder))
        if any(each != held[0] for each in held):
            blind = [number for number, each in enumerate(held) if each != held[0]]
            raise OutputError(
                f"{folder} is another folder for rank {blind[0]} than for rank 0; name one that all machines share"
            )
        yield target


def _writer(folder: Path) -> bytes:
    record = folder / JOURNAL / WRITER
    return record.read_bytes() if record.is_file() else b""


def fill_shards(work: Work, target: Shards, spill_bytes: int = SPILL_BYTES) -> tuple[str, ...]:
    """Quantize everything that `target` lacks; returns notes. Raises `WeightError` (layer named), `OutputError`."""
    if work.recipe.calibration is None:
        stream_shards(work, target)
        return ()
    with native_attention(work.opened.model):
        return calibrate_shards(work, target, spill_bytes)


def open_for(recipe: Recipe, afar: bool = False) -> Opened:
    """The source of a recipe, opened as the recipe needs it; `afar` as for `open_float`. Raises `SourceError`."""
    transforms = () if recipe.calibration is None else recipe.calibration.transforms
    return open_float(
        recipe.model,
        recipe.revision,
        recipe.trust_remote_code,
        untied=needs_untied_head(transforms),
        afar=afar,
    )


def _finished(folder: Path, work: Work) -> Totals | None:
    """The totals of the output if this run has finished it; None if there is work to do. Raises `FormatError`."""
    found = finished_run(folder)
    if found is None or found[0] != work.schedule.key:
        return None
    try:
        return Totals(**found[1]["totals"])
    except (KeyError, TypeError) as error:
        raise FormatError(f"the manifest of {folder} has no totals: {error}") from error
