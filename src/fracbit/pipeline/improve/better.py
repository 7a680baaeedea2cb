"""`tweak` and `refine`: a checkpoint that another program has quantized, made better in its own format.

open both -> samples -> block by block beside the float model, or norms alone on the text -> a patched copy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES
from fracbit.checkpoint.export.one_file import check_file, check_resumable, is_one_file, partial_of
from fracbit.checkpoint.folder import MANIFEST, check_output
from fracbit.checkpoint.formats.gguf_record import lone_file
from fracbit.checkpoint.load import check_device, load_opened, tokenizer_or_none
from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import open_output
from fracbit.checkpoint.patched import PatchedCopy, patched_copy
from fracbit.checkpoint.read_manifest import beside
from fracbit.checkpoint.repacked import movable_layer
from fracbit.checkpoint.shards import check_apart
from fracbit.checkpoint.source import Source
from fracbit.data import Samples
from fracbit.errors import FormatError, OutputError, RecipeError, SourceError
from fracbit.models.attention import native_attention
from fracbit.models.correction import correction
from fracbit.models.distill import Distillation, distill
from fracbit.pipeline.improve.alongside import Walk, walk_alongside
from fracbit.pipeline.improve.code_step import refine_step
from fracbit.pipeline.improve.norm_step import NormStep, norm_kind, norm_places
from fracbit.pipeline.improve.twins import Twins, open_twins
from fracbit.pipeline.quantize.block import HELD_OUT
from fracbit.pipeline.quantize.work import batch_of
from fracbit.pipeline.study.texts import calibration_samples, writer_of
from fracbit.records.calibration import Calibration
from fracbit.records.files import named_path
from fracbit.records.grouped import grouped
from fracbit.records.norm_methods import ON_PREDICTIONS, ON_TEXT, check_norm_method
from fracbit.records.progress import Progress, Shown, phase, showing, silent
from fracbit.records.recipe import Recipe
from fracbit.records.resources import peak_rss
from fracbit.records.run import DistillRecord, Improved, ShardRecord
from fracbit.records.version import __version__

NORMS = "norms"
LOOKED_AT = 7  # layers that show whether codes can be moved
EPOCHS, RATE, BATCH = 4, 3e-3, 4
Moving: TypeAlias = Callable[[Walk, PatchedCopy], Sequence[ShardRecord]]
"""Gives tensors of the copy new values; the records of what was done."""


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

    - `checkpoint`: a folder or hub id of GPTQ, AWQ, compressed-tensors, MLX, ..., or a GGUF file, whose `output` is a file too;
      `calibration`: one or several texts.
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

    def work(walk: Walk, copy: PatchedCopy) -> Sequence[ShardRecord]:
        if moved is None:
            return [_all_at_once(walk, copy)]
        return walk_alongside(walk, NormStep(moved, norm_kind(walk.twins)), copy)

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
    """Move codes and scales of a checkpoint (GPTQ, AWQ, compressed-tensors, GGUF) towards the float model `against`.

    Codes stay in their grid: names, types, shapes and sizes of all tensors stay, and so do zero points, groups and all other
    bytes. A GGUF file gives a file with the same metadata, each tensor in its own type of blocks. By coordinate descent on the
    Gram matrix of each layer's inputs and scales in closed form; a layer that gains nothing stays as it is. `samples`,
    `length`, `seed`, `device` as in `tweak`.

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
    return _improved(asked, lambda walk, copy: walk_alongside(walk, refine_step, copy), _check_codes)


def _calibration(texts: str | Sequence[str], samples: int, length: int | None, word: str) -> Calibration:
    asked = (texts,) if isinstance(texts, (str, Path)) else tuple(texts)
    sizes = {} if length is None else {"length": length}
    return Calibration(texts=tuple(map(str, asked)), samples=samples, tweak=word, **sizes)


def _check_codes(twins: Twins) -> None:
    """Refuse a checkpoint whose codes cannot be moved, as the first layers show. Raises `FormatError`."""
    source = twins.coded.source
    faults = [_fault(source, plain) for plain in list(twins.layers.values())[:LOOKED_AT]]
    if not all(faults) and faults:
        return
    raise FormatError(
        f"{source.name} is {source.decoded}, and refine moves integers of GPTQ, AWQ and compressed-tensors (pack-quantized) "
        f"and GGUF's {', '.join(BLOCK_TYPES)}{f': {faults[0]}' if faults else ''}; fracbit tweak moves its norms"
    )


def _fault(source: Source, plain: str) -> str:
    """Why the codes of a layer cannot be moved, "" where they can."""
    try:
        movable_layer(source, plain)
    except FormatError as error:
        return f"{plain}: {error}"
    return ""


def _improved(asked: Task, work: Moving, check: Callable[[Twins], object]) -> Improved:
    """Open, check, draw samples, do the `work` on a copy and finish it."""
    started, output = time.perf_counter(), named_path(asked.output, OutputError)
    check_device(asked.device)
    _check_output(asked, output)
    twins = open_twins(asked.checkpoint, asked.against, asked.trust_remote_code)
    for opened in (twins.coded, twins.floats):
        if opened is not None:
            check_apart(output, lone_file(opened.source) or opened.source.folder)
    check(twins)
    with showing(asked.progress) as shown:
        show = shown or silent
        seen = _samples(twins, asked, show)
        device = torch.device(asked.device)
        batch = batch_of(asked.calibration, seen.ids.shape[1], device)
        walk = Walk(twins, seen, batch, device=device, show=phase(show, asked.verb))
        key = twins.key(asked.verb, asked.method, seen.sha256, asked.device)
        one = is_one_file(output)
        with (
            open_output(
                partial_of(output) if one else output,
                key,
                expected_bytes=_bytes(twins.coded.source),
                overwrite=asked.overwrite,
                resume=asked.resume,
            ) as target,
            native_attention(twins.coded.model),
        ):
            copy = patched_copy(twins.coded.source, target)
            records = work(walk, copy)
            facts = {"run": key, **_facts(walk, asked, records)}
            written = copy.finish(facts, code=asked.trust_remote_code, file=output if one else None)
    losses = [record.distilled for record in records if record.distilled is not None]
    said = (pair for record in records for pair in record.notes.items())
    return Improved(
        str(output),
        asked.method,
        written,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss(),
        tweaks=tuple(record.tweak for record in records if record.tweak is not None),
        layers={name: one for record in records for name, one in record.refined.items()},
        loss=losses[0] if losses else None,
        notes=(*target.notes, *grouped(said, str(beside(output) if one else MANIFEST))),
    )


def _check_output(asked: Task, output: Path) -> None:
    """Refuse an output that cannot be written, before anything that takes long. Raises `OutputError`, `RecipeError`."""
    file = is_one_file(output)
    if file != named_path(asked.checkpoint, SourceError).is_file():
        what = "a file" if file else "a folder"
        other = f"a folder for that of {asked.checkpoint}" if file else f"a file, such as {output}.gguf"
        raise OutputError(f"{output} is {what}, and {asked.checkpoint} is none; name {other}")
    if file:
        check_file(output, overwrite=asked.overwrite, resume=asked.resume)
        check_resumable(output, resume=asked.resume, overwrite=asked.overwrite)
    elif not asked.resume:  # a resumed run is known by its key
        check_output(output, "", asked.overwrite, asked.resume)


def _bytes(source: Source) -> int:
    """Bytes of the weight files."""
    files = {info.file for info in source.on_disk.values()}
    return sum((source.folder / file).stat().st_size for file in files)


def _samples(twins: Twins, asked: Task, show: Progress) -> Samples:
    """The samples, read with the tokenizer of the checkpoint, or with that of the float model where it has none."""
    opened = _reader(twins)
    recipe = Recipe(model=opened.source.name, calibration=asked.calibration, seed=asked.seed)
    return calibration_samples(recipe, opened, lambda: writer_of(twins.floats or opened, asked.device), show)


def _reader(twins: Twins) -> Opened:
    own = tokenizer_or_none(twins.coded.source.folder, twins.coded.trust_remote_code)
    return twins.coded if own is not None or twins.floats is None else twins.floats


def _all_at_once(walk: Walk, copy: PatchedCopy) -> ShardRecord:
    """Train the norms of the whole model, decoded, on what the float model predicts, or without one on the text's own loss."""
    twins, done = walk.twins, copy.record(NORMS)
    if done is not None:
        return done
    floats = twins.floats
    teacher = None if floats is None else load_opened(floats, torch.float32, walk.device)
    model = load_opened(twins.coded, torch.float32, walk.device)
    model.requires_grad_(False)
    places = norm_places(twins)
    gains = {name: model.get_parameter(name) for name in places}
    plan = Distillation(
        EPOCHS, RATE, BATCH, held_out=1 / HELD_OUT, seed=walk.samples.seed, kind=norm_kind(twins)
    )

    def show(epoch: int, loss: float) -> None:
        walk.show(f"norms of all blocks, {loss:.4f} nats", epoch, plan.epochs)

    ids = walk.samples.ids.to(walk.device)  # [samples, tokens]
    found = distill(teacher, model, soft={}, norms=gains, ids=ids, how=plan, show=show)
    record = ShardRecord(distilled=DistillRecord(**asdict(found)))
    copy.write(NORMS, dict(places[name].stored(gain) for name, gain in gains.items()), record)
    return record


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
