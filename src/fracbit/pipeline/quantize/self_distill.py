"""The last stage of a calibrated run, when asked for: distil the whole quantized model from the float one, rewrite its shards.

Tuned shards are collected in the journal first; a marker says that all are there, and only then do they replace the others. A
run that is killed before the marker trains again from the untouched shards, one killed after it goes on replacing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer, packed_layer, tensor_names
from fracbit.checkpoint.load import load
from fracbit.checkpoint.output import JOURNAL, Output, write_json
from fracbit.data import Samples
from fracbit.models.blocks import blocks, norms
from fracbit.models.distill import Distillation, Distilled, distill, soften
from fracbit.models.experts import split_experts
from fracbit.models.install import set_weight, untie_head
from fracbit.models.soft import SoftLinear
from fracbit.numerics.activations import round_through
from fracbit.numerics.packed import PackedTensor, decode
from fracbit.pipeline.quantize.block import Work, item_as_stored
from fracbit.pipeline.quantize.rotate import fed_through
from fracbit.pipeline.quantize.schedule import Schedule
from fracbit.transforms.rotation import turn_inputs

TUNED = "tuned"
MARKER = "distilled.json"


def distill_shards(work: Work, target: Output, schedule: Schedule, samples: Samples) -> None:
    """Train and rewrite the shards of `schedule`; what it bought is noted in the record of the last one."""
    marker = target.folder / JOURNAL / MARKER
    if not marker.is_file():
        tuned, result = train(work, target, schedule, samples)
        folder = target.folder / JOURNAL / TUNED
        folder.mkdir(exist_ok=True)
        for shard, tensors in tuned.items():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard)
        write_json(marker, asdict(result))
    facts = json.loads(marker.read_text())
    for shard in schedule.shards:
        path = target.folder / JOURNAL / TUNED / shard
        if path.is_file():
            record = target.record(shard)
            assert record is not None
            target.write_shard(
                shard, load_file(target.folder / shard) | load_file(path), {**record, "distilled": facts}
            )
            path.unlink()


def train(
    work: Work, target: Output, schedule: Schedule, samples: Samples
) -> tuple[dict[str, dict[str, Tensor]], Distilled]:
    """The tensors that changed, by shard, and what training bought."""
    stored = {shard: load_file(target.folder / shard) for shard in schedule.shards}
    layers = _layers(target, schedule)
    packed = {
        name: packed_layer(name, layers[name], stored[shard]) for name, shard in _shards(schedule).items()
    }
    teacher, student = _float_model(work), _float_model(work)
    _fill(work, student, stored, {name: tensor for name, tensor in packed.items() if not _inside(work, name)})
    gains = _norms(work, student)
    trained = {name: tensor.to(work.device) for name, tensor in packed.items() if _inside(work, name)}
    soft = soften(student, trained, rewritten=bool(work.plan.transforms))
    plan = Distillation(epochs=work.plan.distill, rate=work.plan.rate, seed=work.recipe.seed)

    def show(epoch: int, loss: float) -> None:
        work.show(f"distilling, {loss:.4f} nats from the float model", epoch, plan.epochs)

    with fed_through(student, {name: partial(_as_fed, layer=layers[name]) for name in soft}):
        result = distill(teacher, student, soft, gains, samples.ids.to(work.device), plan, show)
    return {shard: _changed(tensors, soft, gains) for shard, tensors in stored.items()}, result


def _float_model(work: Work) -> PreTrainedModel:
    model = load(
        work.source.folder,
        dtype=torch.float32,
        device=work.device,
        trust_remote_code=work.recipe.trust_remote_code,
    )
    split_experts(model)
    return model


def _fill(
    work: Work,
    student: PreTrainedModel,
    stored: Mapping[str, Mapping[str, Tensor]],
    outside: Mapping[str, PackedTensor],
) -> None:
    """Bring a float model to what is stored beside the linears of the blocks: norms, biases, embeddings, head."""
    if work.stream is not None:
        untie_head(student, work.family)
    for name, packed in outside.items():
        set_weight(student.get_submodule(name), decode(packed))
    state = student.state_dict()
    with torch.no_grad():
        for tensors in stored.values():
            for name, tensor in tensors.items():
                if name in state and state[name].shape == tensor.shape:
                    state[name].copy_(tensor)


def _as_fed(x: Tensor, layer: StoredLayer) -> Tensor:
    """What a stored layer multiplies, differentiable."""
    x = turn_inputs(x) if layer.rotated else x
    return x if layer.inputs is None else round_through(x, layer.inputs)


def _shards(schedule: Schedule) -> dict[str, str]:
    """The shard of every quantized layer."""
    return {
        item.layer.name: shard
        for shard, items in schedule.shards.items()
        for item in items
        if item.layer is not None and item.stored is not None
    }


def _layers(target: Output, schedule: Schedule) -> dict[str, StoredLayer]:
    """How every quantized layer is stored."""
    found: dict[str, StoredLayer] = {}
    for shard, items in schedule.shards.items():
        record = target.record(shard)
        assert record is not None
        for item in items:
            stored = item_as_stored(item, record["layers"]).stored
            if item.layer is not None and stored is not None:
                found[item.layer.name] = stored
    return found


def _inside(work: Work, name: str) -> bool:
    return name.startswith(f"{work.family.blocks}.")


def _norms(work: Work, model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Gains and biases of the norms inside the blocks, by full name."""
    found: dict[str, nn.Parameter] = {}
    for path, block in blocks(model, work.family):
        for norm in norms(block, work.family):
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
