"""`Work`: everything that a run needs and that does not change from its first shard to its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fracbit.checkpoint.load import check_device
from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import SHARD_BYTES
from fracbit.checkpoint.source import Source
from fracbit.data import Samples
from fracbit.errors import RecipeError
from fracbit.models.blocks import blocks, borrowed
from fracbit.models.correction import correction
from fracbit.models.walk import Hidden
from fracbit.numerics.stats import Stats
from fracbit.pipeline.quantize.columns import choose_columns
from fracbit.pipeline.quantize.layer import Method
from fracbit.pipeline.quantize.ranks import ALONE, Ranks
from fracbit.pipeline.quantize.reader import Reader
from fracbit.pipeline.quantize.rotate import rotates, stream_rotation
from fracbit.pipeline.quantize.sample_pieces import Pieces
from fracbit.pipeline.quantize.schedule import LayerItem, Schedule, by_block, make_schedule
from fracbit.pipeline.study.texts import calibration_samples, writer_of
from fracbit.quantizers import nearest, quantizer
from fracbit.records.calibration import Calibration
from fracbit.records.progress import Progress, silent
from fracbit.records.recipe import Recipe, check_data
from fracbit.records.scheme import Scheme
from fracbit.records.tables import COLUMN_RULES

Seen = tuple[dict[str, Stats], Hidden]
"""Statistics of a block's linears, and the block's output states."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What runs on one model share: a cache that is filled on demand. A single run has none.

    `tensors` of the source with their hashes; `samples` by the settings that decide them; `observed`: statistics of the
    float blocks' linears, and the blocks' output states; `token_weights` of a float walk.
    """

    tensors: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    samples: dict[object, Samples] = field(default_factory=dict)
    observed: dict[object, Seen] = field(default_factory=dict)
    token_weights: dict[object, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """A prepared run: its recipe, the opened source, the schedule, and how layers are quantized.

    - `samples` is None for a data-free run. `dtype`: of the forward passes; `source_dtype`: the least precise type of
      the source.
    - `signs` [width] of the rotation of the residual stream; None where it is not rotated.
    - `memory`: what this run shares with others on the same model.
    - `token_weights` [samples * tokens] by linear: how much each token counts there; empty where all count the same.
    - `ranks`: the processes that share the run.
    - `shared`: statistics of linears that several blocks use, by full name.
    """

    recipe: Recipe
    opened: Opened
    schedule: Schedule
    reader: Reader
    method: Method
    device: torch.device
    dtype: torch.dtype
    source_dtype: torch.dtype
    show: Progress
    samples: Samples | None = None
    signs: Tensor | None = None
    memory: Memory | None = None
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Stats] = field(default_factory=dict)
    ranks: Ranks = ALONE

    @property
    def pieces(self) -> Pieces:
        """Which samples this rank calibrates on."""
        assert self.samples is not None
        samples, length = self.samples.ids.shape
        return self.ranks.pieces(samples, batch_of(self.calibration, length, self.device))

    @property
    def calibration(self) -> Calibration:
        """The recipe's calibration; only for runs that have one."""
        assert self.recipe.calibration is not None
        return self.recipe.calibration


Groups = Sequence[tuple[str, ...]]
CACHED_TOKENS = 1024  # that run through a block at once: a tenth less memory than 4096, and not slower


@dataclass(frozen=True, eq=False)
class Entrance:
    """The states before a block: `hidden`, which it is calibrated on; `exact`, the float model's, where these are followed."""

    hidden: Hidden
    exact: Hidden | None = None


def batch_of(calibration: Calibration, length: int, device: torch.device) -> int:
    """Samples of `length` ids that run through a block at once, at most `calibration.batch`.

    With a correction there are at least two batches, so that one can be held out, and as many tokens in each as it takes.
    Without one, a CPU takes only as many tokens as its caches hold; this saves memory and gives the same result.
    """
    if calibration.tweak != "none":
        tokens = correction(calibration.tweak).tokens
        batch = calibration.batch if tokens is None else max(1, tokens // length)
        return min(batch, max(1, calibration.samples // 2))
    if device.type == "cpu":
        return min(calibration.batch, max(1, CACHED_TOKENS // length))
    return calibration.batch


def walk_key(work: Work) -> tuple[object, ...]:
    """Everything except the weights that decides the states of a float walk."""
    assert work.samples is not None
    batch = batch_of(work.calibration, work.samples.ids.shape[1], work.device)
    return (work.samples.sha256, work.dtype, str(work.device), batch)


def reads_gram(work: Work) -> bool:
    """Whether anything in the run reads the Gram matrices of the inputs."""
    calibration = work.calibration
    return (
        "gram" in work.method.fill.reads
        or calibration.axis != "scheme"
        or calibration.tweak != "none"
        or bool(calibration.transforms)
    )


def follows_model(calibration: Calibration) -> bool:
    """Whether the float model's states are carried beside those of the quantized chain, for a correction that follows them."""
    tweak = calibration.tweak
    return tweak != "none" and calibration.chain == "quantized" and correction(tweak).follows == "model"


@dataclass(frozen=True, eq=False)
class Block:
    """A float block that is about to be quantized: its module and path, the states that enter it, and the work to do.

    `exact`: the float model's states there, where a correction follows them.
    `schemes`: by the names of its linears inside the block; `order`: those linears in groups that read one input, in
    order of use; `turned`: linears whose inputs are rotated at run time.
    """

    path: str
    module: nn.Module
    hidden: Hidden
    exact: Hidden | None
    schemes: Mapping[str, Scheme]
    order: Groups
    turned: tuple[str, ...]


def prepare(
    recipe: Recipe,
    opened: Opened,
    *,
    shard_bytes: int = SHARD_BYTES,
    device: str | torch.device = "cpu",
    memory: Memory | None = None,
    samples: Samples | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Work:
    """Check a recipe against its model and read its samples; nothing is quantized yet.

    `samples`: those of its calibration, where they have been drawn before (`calibration_samples`).
    Raises `RecipeError` for settings that exclude each other, `SourceError`, `DataError`.
    """
    _check(recipe, device)
    check_shared(recipe, ranks)
    show = progress or silent
    reader = Reader(opened.source, None if memory is None else memory.tensors)
    schedule = make_schedule(recipe, opened, shard_bytes)
    calibration, signs = recipe.calibration, None
    if calibration is not None:
        _check_distilled(calibration, opened)
        samples = samples or _samples(recipe, opened, device=device, memory=memory, show=show)
        schedule = by_block(schedule, opened, f"{samples.sha256}{_place(device)}")
        signs = stream_rotation(opened.model, opened.family, calibration.transforms, recipe.seed)
    return Work(
        recipe=recipe,
        opened=opened,
        schedule=schedule,
        reader=reader,
        method=_method(recipe, opened, schedule, reader),
        device=torch.device(device),
        dtype=forward_dtype(calibration, opened.source, torch.device(device)),
        source_dtype=stored_dtype(opened.source),
        show=show,
        samples=samples,
        signs=signs,
        memory=memory,
        ranks=ranks,
    )


def check_shared(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what ranks do not share out yet: passes that train on all samples at once. Raises `RecipeError`."""
    calibration = recipe.calibration
    if ranks.count == 1 or calibration is None:
        return
    whole = {
        f"calibration.tweak = {calibration.tweak}": calibration.tweak != "none",
        f"calibration.distill = {calibration.distill}": calibration.distill > 0,
        f"calibration.axis = {calibration.axis}": calibration.axis not in ("scheme", "predicted"),
    }
    for setting, asked in whole.items():
        if asked:
            raise RecipeError(
                f"{ranks.count} ranks cannot share {setting}; start one process, or leave it out"
            )


def check_words(recipe: Recipe) -> None:
    """Refuse options that a quantizer or a correction does not have, before anything is opened. Raises `RecipeError`."""
    quantizer(recipe.quantizer)
    if recipe.calibration is not None and recipe.calibration.tweak != "none":
        correction(recipe.calibration.tweak)


def _check(recipe: Recipe, device: str | torch.device) -> None:
    """Refuse settings that exclude each other, before anything is read."""
    check_words(recipe)
    calibration = recipe.calibration
    asked = "" if recipe.outliers is None else recipe.outliers.chosen
    wanted = COLUMN_RULES[asked].needs if asked else frozenset()
    check_data(recipe, bool(quantizer(recipe.quantizer).needs), "energy" in wanted)
    if calibration is None and torch.device(device).type != "cpu":
        raise RecipeError(
            f"device {device} needs calibration: rounding without data runs on the CPU; leave the device out"
        )
    if calibration is not None and calibration.tweak != "none" and calibration.samples < 2:
        raise RecipeError(
            f"correction {calibration.tweak} needs at least 2 samples, got {calibration.samples}; give more samples, or set "
            "tweak to none"
        )
    if calibration is not None and rotates(calibration.transforms) and "producers" in wanted:
        raise RecipeError(
            f"outliers by {asked} are chosen before the rotation and do not fit it; use cost, or leave the rotation out"
        )
    check_device(device)


def _check_distilled(calibration: Calibration, opened: Opened) -> None:
    """Refuse to distill a model whose blocks share weights: each of its linears is trained alone."""
    if calibration.distill and any(
        borrowed(opened.model, path) for path, _ in blocks(opened.model, opened.family)
    ):
        raise RecipeError(
            f"blocks of {type(opened.model).__name__} share weights, which cannot be distilled; set calibration.distill to 0"
        )


def _method(recipe: Recipe, opened: Opened, schedule: Schedule, reader: Reader) -> Method:
    fill = quantizer(recipe.quantizer, recipe.search)
    unseen = fill if recipe.calibration is None else nearest(search=True)
    if recipe.outliers is None:
        return Method(fill, unseen)
    rule = COLUMN_RULES[recipe.outliers.chosen]
    share = recipe.outliers.share
    if not rule.ahead:
        return Method(fill, unseen, rule, share)
    items = {
        item.layer.name: item
        for items in schedule.shards.values()
        for item in items
        if isinstance(item, LayerItem)
    }
    schemes = {name: item.stored.scheme for name, item in items.items()}
    read = _weights_by_name(opened, reader)
    return Method(
        fill,
        unseen,
        rule=rule,
        share=share,
        columns=choose_columns(rule, share, schemes=schemes, opened=opened, read=read, seed=recipe.seed),
    )


def _weights_by_name(opened: Opened, reader: Reader) -> Callable[[str], Tensor]:
    """Reads the weight [out, in] of a layer of the source, quantized or not."""

    def read(name: str) -> Tensor:
        origin = opened.origins.tensors[f"{name}.weight"]
        tensor = reader.read_origin(origin)[0]
        layer = opened.layers.get(name)
        return tensor.T if layer is not None and layer.transposed else tensor  # [out, in]

    return read


def _samples(
    recipe: Recipe, opened: Opened, device: str | torch.device, memory: Memory | None, show: Progress
) -> Samples:
    """The calibration samples, drawn once where runs share a memory. Raises `DataError`."""
    calibration = recipe.calibration
    assert calibration is not None
    asked = (calibration.texts, calibration.builtin, calibration.samples, calibration.length, recipe.seed)
    if memory is not None and asked in memory.samples:
        return memory.samples[asked]
    found = calibration_samples(recipe, opened, lambda: writer_of(opened, device), show)
    if memory is not None:
        memory.samples[asked] = found
    return found


def _place(device: str | torch.device) -> str:
    """The device in the run's key, "" for the CPU: other devices round differently."""
    kind = torch.device(device).type
    return "" if kind == "cpu" else f" {kind}"


def forward_dtype(calibration: Calibration | None, source: Source, device: torch.device) -> torch.dtype:
    """bfloat16 when asked for, or when the device multiplies it natively and the model is stored in it.

    Rotated weights are no longer bfloat16 numbers: they are kept in float32 until they are quantized.
    """
    if calibration is None:
        return torch.float32
    if calibration.dtype != "auto" or rotates(calibration.transforms):
        return torch.bfloat16 if calibration.dtype == "bfloat16" else torch.float32
    stored = {info.dtype for info in source.tensors.values()}
    native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == {"BF16"} and native else torch.float32


def stored_dtype(source: Source) -> torch.dtype:
    """The least precise float type that the source stores tensors in."""
    stored = {info.dtype for info in source.tensors.values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32
