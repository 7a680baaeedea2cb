"""`tweak` and `refine`: a checkpoint that another program has quantized, made better in its own format.

open both -> samples -> block by block beside the float model, or norms alone on the text -> a patched copy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.folder import check_output
from fracbit.checkpoint.load import check_device, load_opened, tokenizer_or_none
from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import Output, open_output
from fracbit.checkpoint.patched import finished_blocks, write_patched
from fracbit.checkpoint.repacked import integer_layer
from fracbit.checkpoint.shards import check_apart
from fracbit.checkpoint.source import Source
from fracbit.data import Samples
from fracbit.errors import FormatError, RecipeError
from fracbit.models.attention import native_attention
from fracbit.models.correction import correction
from fracbit.models.distill import Distillation, distill
from fracbit.pipeline.improve.alongside import Walk, walk_alongside
from fracbit.pipeline.improve.code_step import refine_step
from fracbit.pipeline.improve.norm_step import NormStep, as_stored, norm_gains, norm_kind
from fracbit.pipeline.improve.twins import Twins, open_twins
from fracbit.pipeline.quantize.block import HELD_OUT
from fracbit.pipeline.quantize.work import batch_of
from fracbit.pipeline.study.texts import calibration_samples, writer_of
from fracbit.records.calibration import Calibration
from fracbit.records.norm_methods import ON_PREDICTIONS, ON_TEXT, check_norm_method
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.recipe import Recipe
from fracbit.records.resources import peak_rss
from fracbit.records.run import DistillRecord, Improved, ShardRecord
from fracbit.records.version import __version__

NORMS_SHARD = "norms.safetensors"
LOOKED_AT = 7  # layers that show whether codes can be moved
EPOCHS, RATE, BATCH = 4, 3e-3, 4
Changed = tuple[dict[str, Tensor], list[ShardRecord]]
"""New values of tensors by their names on the disk, and the records of what was done."""


@dataclass(frozen=True)
class Task:
    """What is asked for: which files are improved by which method with which data, and how the run goes."""

    verb: str
    method: str
    checkpoint: str | Path
    output: str | Path
    against: str | Path | None
    calibration: Calibration
    seed: int
    overwrite: bool
    resume: bool
    device: str
    trust_remote_code: bool
    progress: Shown


def tweak(
    checkpoint: str | Path,
    output: str | Path,
    calibration: str | Sequence[str],
    *,
    against: str | Path | None = None,
    method: str | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Improved:
    """Move the norms of a checkpoint that another program has quantized; all else is copied byte by byte into `output`.

    - `checkpoint`: a folder or hub id of GPTQ, AWQ, compressed-tensors, MLX, ...; `calibration`: one or several texts.
    - `against`: the float model. By `method` `predictions` (default) the norms of all blocks at once learn what it predicts.
      Without a float model they learn to predict the text. The epoch of least loss on held-out samples is kept, or none.
      Models must fit into memory in fp32.
    - `method` `adam`, `closed`, or `auto`, the better of both or neither, each with options such as `adam:rate=2e-3`: each
      block's norms are moved until it gives what the float block gives. One block is in memory.
    - `samples` of `length` ids (default: 512, at most the model's positions), drawn by `seed`; `device`: where blocks run.

    Raises a `FracbitError`: `SourceError`, `FormatError`, `RecipeError`, `DataError`, `WeightError`, `OutputError`.
    """
    check_norm_method(method, against)
    word = method or ON_PREDICTIONS
    whole = against is None or word == ON_PREDICTIONS
    if samples < 2:
        raise RecipeError(f"tweak needs at least 2 samples, one to judge by; got {samples}")
    moved = None if whole else correction(word)

    def work(walk: Walk, target: Output) -> Changed:
        if moved is None:
            return _all_at_once(walk, target)
        return walk_alongside(walk, NormStep(moved, norm_kind(walk.twins)), target)

    asked = Task(
        "tweak",
        ON_TEXT if against is None else word,
        checkpoint=checkpoint,
        output=output,
        against=against,
        calibration=_calibration(calibration, samples, length, "none" if whole else word),
        seed=seed,
        overwrite=overwrite,
        resume=resume,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return _improved(asked, work, norm_kind)


def refine(
    checkpoint: str | Path,
    output: str | Path,
    calibration: str | Sequence[str],
    against: str | Path,
    *,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Improved:
    """Move codes and scales of a checkpoint (GPTQ, AWQ, compressed-tensors pack-quantized) towards the float model `against`.

    Codes stay in their grid: names, types, shapes and sizes of all tensors stay, and so do zero points, groups and all other
    bytes. By coordinate descent on the Gram matrix of each layer's inputs and scales in closed form; a layer that gains nothing
    stays as it is. `samples`, `length`, `seed`, `device` as in `tweak`.

    Raises a `FracbitError`: `SourceError`, `FormatError`, `DataError`, `WeightError`, `OutputError`.
    """
    asked = Task(
        "refine",
        "descent",
        checkpoint=checkpoint,
        output=output,
        against=against,
        calibration=_calibration(calibration, samples, length, "none"),
        seed=seed,
        overwrite=overwrite,
        resume=resume,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return _improved(asked, lambda walk, target: walk_alongside(walk, refine_step, target), _check_integers)


def _calibration(texts: str | Sequence[str], samples: int, length: int | None, word: str) -> Calibration:
    asked = (texts,) if isinstance(texts, (str, Path)) else tuple(texts)
    sizes = {} if length is None else {"length": length}
    return Calibration(texts=tuple(map(str, asked)), samples=samples, tweak=word, **sizes)


def _check_integers(twins: Twins) -> None:
    """Refuse a checkpoint whose codes cannot be moved, as the first layers show. Raises `FormatError`."""
    source = twins.coded.source
    faults = [_fault(source, plain) for plain in list(twins.layers.values())[:LOOKED_AT]]
    if not all(faults) and faults:
        return
    raise FormatError(
        f"{source.name} is {source.decoded}, and refine moves integers of GPTQ, AWQ and compressed-tensors (pack-quantized)"
        + (f": {faults[0]}" if faults else "")
        + "; fracbit tweak moves its norms"
    )


def _fault(source: Source, plain: str) -> str:
    """Why the codes of a layer cannot be moved, "" where they can."""
    try:
        integer_layer(source, plain)
    except FormatError as error:
        return f"{plain}: {error}"
    return ""


def _improved(
    asked: Task, work: Callable[[Walk, Output], Changed], check: Callable[[Twins], object]
) -> Improved:
    """Open, check, draw samples, do the `work` and write the copy."""
    started, folder = time.perf_counter(), Path(asked.output).expanduser()
    check_device(asked.device)
    if not asked.resume:  # before anything that takes long; a resumed run is known by its key
        check_output(folder, "", asked.overwrite, asked.resume)
    twins = open_twins(asked.checkpoint, asked.against, asked.trust_remote_code)
    source = twins.coded.source
    for opened in (twins.coded, twins.floats):
        if opened is not None:
            check_apart(folder, opened.source.folder)
    check(twins)
    with showing(asked.progress) as shown:
        show = shown or (lambda what, done, total: None)
        seen = _samples(twins, asked, show)
        device = torch.device(asked.device)
        batch = batch_of(asked.calibration, seen.ids.shape[1], device)
        walk = Walk(twins, seen, batch, device=device, show=show)
        key = twins.key(asked.verb, asked.method, seen.sha256, asked.device)
        size = sum(info.bytes for info in source.on_disk.values())
        with (
            open_output(
                folder, key, expected_bytes=size, overwrite=asked.overwrite, resume=asked.resume
            ) as target,
            native_attention(twins.coded.model),
        ):
            changed, records = work(walk, target)
            facts = {"run": key, **_facts(walk, asked, records)}
            written = write_patched(source, changed, target, facts, code=asked.trust_remote_code)
    losses = [record.distilled for record in records if record.distilled is not None]
    return Improved(
        str(folder),
        asked.method,
        written,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss(),
        tweaks=tuple(record.tweak for record in records if record.tweak is not None),
        layers={name: one for record in records for name, one in record.refined.items()},
        loss=losses[0] if losses else None,
        notes=(*target.notes, *(note for record in records for note in record.notes)),
    )


def _samples(twins: Twins, asked: Task, show: Progress) -> Samples:
    """The samples, read with the tokenizer of the checkpoint, or with that of the float model where it has none."""
    opened = _reader(twins)
    recipe = Recipe(model=opened.source.name, calibration=asked.calibration, seed=asked.seed)
    return calibration_samples(recipe, opened, lambda: writer_of(twins.floats or opened, asked.device), show)


def _reader(twins: Twins) -> Opened:
    own = tokenizer_or_none(twins.coded.source.folder, twins.coded.trust_remote_code)
    return twins.coded if own is not None or twins.floats is None else twins.floats


def _all_at_once(walk: Walk, target: Output) -> Changed:
    """Train the norms of the whole model, decoded, on what the float model predicts, or without one on the text's own loss."""
    twins, done = walk.twins, finished_blocks(target)
    if done.record(NORMS_SHARD) is None:
        floats = twins.floats
        teacher = None if floats is None else load_opened(floats, torch.float32, walk.device)
        model = load_opened(twins.coded, torch.float32, walk.device)
        model.requires_grad_(False)
        gains = norm_gains(twins, model)
        plan = Distillation(
            EPOCHS, RATE, BATCH, held_out=1 / HELD_OUT, seed=walk.samples.seed, kind=norm_kind(twins)
        )

        def show(epoch: int, loss: float) -> None:
            walk.show(f"norms, {loss:.4f} nats", epoch, plan.epochs)

        ids = walk.samples.ids.to(walk.device)  # [samples, tokens]
        found = distill(teacher, model, soft={}, norms=gains, ids=ids, how=plan, show=show)
        moved = {name: gain.detach().cpu().clone() for name, gain in gains.items()}
        done.write_shard(
            NORMS_SHARD, as_stored(twins, moved), ShardRecord(distilled=DistillRecord(**asdict(found)))
        )
    record = done.record(NORMS_SHARD)
    assert record is not None
    return done.tensors(NORMS_SHARD), [record]


def _facts(walk: Walk, asked: Task, records: Sequence[ShardRecord]) -> dict[str, Any]:
    """What the manifest says of the change."""
    said = [record.to_json() for record in records]
    facts = [
        {name: value for name, value in one.items() if name not in ("hashes", "layers", "stored")}
        for one in said
    ]
    floats = walk.twins.floats
    return {
        "fracbit": __version__,
        "texts": [walk.samples.to_json()],
        "improved": {
            "by": asked.verb,
            "method": asked.method,
            "checkpoint": walk.twins.coded.source.name,
            "against": None if floats is None else floats.source.name,
            "records": facts,
        },
    }
