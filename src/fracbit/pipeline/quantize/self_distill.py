"""The optional last stage of a calibrated run: distill the quantized model from the float model and rewrite its shards.

Tuned shards are first collected in the journal. When all are there, a marker is written, and only then do they replace
the others. A run that is killed before the marker trains again from the unchanged shards; a run that is killed after it
continues to replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer, packed_layer, tensor_names
from fracbit.checkpoint.load import load_opened
from fracbit.checkpoint.output import Shards, write_json
from fracbit.models.blocks import blocks, norms
from fracbit.models.distill import Distillation, distill, soften
from fracbit.models.install import set_tensor, set_weight, untie_head
from fracbit.models.soft import SoftLinear
from fracbit.numerics.activations import round_through
from fracbit.numerics.packed import PackedTensor, decode
from fracbit.pipeline.quantize.record import records_of, stored_layers
from fracbit.pipeline.quantize.rotate import fed_through
from fracbit.pipeline.quantize.schedule import LayerItem
from fracbit.pipeline.quantize.work import Work
from fracbit.records.files import read_json
from fracbit.records.progress import DISTILLING
from fracbit.records.run import DistillRecord, ShardRecord
from fracbit.transforms.rotation import turn_inputs

TUNED = "tuned"
MARKER = "distilled.json"


def distill_shards(work: Work, target: Shards) -> None:
    """Train and rewrite the finished shards; their records note the result."""
    records = records_of(work.schedule, target)
    if target.journal is None:
        tuned, result = train(work, target, records)
        _replace(target, records, tuned, result)
        return
    marker, folder = target.journal / MARKER, target.journal / TUNED
    if not marker.is_file():
        tuned, result = train(work, target, records)
        folder.mkdir(exist_ok=True)
        for shard, tensors in tuned.items():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard)
        write_json(marker, asdict(result))
    result = DistillRecord(**read_json(marker))
    for shard in work.schedule.shards:
        path = folder / shard
        if path.is_file():
            _replace(target, records, {shard: load_file(path)}, result)
            path.unlink()


def _replace(
    target: Shards,
    records: Mapping[str, ShardRecord],
    tuned: Mapping[str, Mapping[str, Tensor]],
    result: DistillRecord,
) -> None:
    for shard, tensors in tuned.items():
        record = replace(records[shard], distilled=result)
        target.write_shard(shard, {**target.tensors(shard), **tensors}, record)


def train(
    work: Work, target: Shards, records: Mapping[str, ShardRecord]
) -> tuple[dict[str, dict[str, Tensor]], DistillRecord]:
    """The changed tensors by shard, and the result of the training."""
    stored = {shard: target.tensors(shard) for shard in work.schedule.shards}
    layers = stored_layers(work.schedule, records)
    packed = {
        item.layer.name: packed_layer(item.layer.name, layers[item.layer.name], stored[shard])
        for shard, items in work.schedule.shards.items()
        for item in items
        if isinstance(item, LayerItem)
    }
    teacher, student = _float_model(work), _float_model(work)
    _fill(work, student, stored, {name: tensor for name, tensor in packed.items() if not _inside(work, name)})
    gains = _norms(work, student)
    trained = {name: tensor.to(work.device) for name, tensor in packed.items() if _inside(work, name)}
    soft = soften(student, trained, rewritten=bool(work.calibration.transforms))
    plan = Distillation(epochs=work.calibration.distill, rate=work.calibration.rate, seed=work.recipe.seed)

    def show(epoch: int, loss: float) -> None:
        work.show(f"{DISTILLING}: {loss:.4f} nats from the float model", epoch, plan.epochs)

    assert work.samples is not None
    with fed_through(student, {name: partial(_as_fed, layer=layers[name]) for name in soft}):
        result = distill(
            teacher,
            student,
            soft=soft,
            norms=gains,
            ids=work.samples.ids.to(work.device),
            how=plan,
            show=show,
        )
    changed = {shard: _changed(tensors, soft, gains) for shard, tensors in stored.items()}
    return changed, DistillRecord(**asdict(result))


def _float_model(work: Work) -> PreTrainedModel:
    return load_opened(work.opened, torch.float32, work.device)


def _fill(
    work: Work,
    student: PreTrainedModel,
    stored: Mapping[str, Mapping[str, Tensor]],
    outside: Mapping[str, PackedTensor],
) -> None:
    """Give a float model the stored tensors outside the blocks' linears: norms, biases, embeddings, head."""
    if work.signs is not None:
        untie_head(student, work.opened.family)
    for name, packed in outside.items():
        set_weight(student.get_submodule(name), decode(packed))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    for tensors in stored.values():
        for name, tensor in tensors.items():
            if shapes.get(name) == tensor.shape:
                set_tensor(student, name, tensor)


def _as_fed(x: Tensor, layer: StoredLayer) -> Tensor:
    """The input of a stored layer, rotated and rounded as it is at run time; differentiable."""
    x = turn_inputs(x) if layer.rotated else x
    return x if layer.inputs is None else round_through(x, layer.inputs)


def _inside(work: Work, name: str) -> bool:
    return name.startswith(f"{work.opened.family.blocks}.")


def _norms(work: Work, model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Gains and biases of the norms inside the blocks, by full name."""
    found: dict[str, nn.Parameter] = {}
    for path, block in blocks(model, work.opened.family):
        for norm in norms(block, work.opened.family):
            for leaf, parameter in block.get_submodule(norm.name).named_parameters(recurse=False):
                found[f"{path}.{norm.name}.{leaf}"] = parameter
    return found


def _changed(
    tensors: Mapping[str, Tensor], soft: Mapping[str, SoftLinear], gains: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """New tensors of one shard: those of its linears and norms."""
    made: dict[str, Tensor] = {}
    for name, layer in soft.items():
        if f"{name}.weight" in tensors:
            made |= tensor_names(name, layer.packed().to("cpu"))
    return made | {
        name: gain.detach().cpu().to(tensors[name].dtype) for name, gain in gains.items() if name in tensors
    }
