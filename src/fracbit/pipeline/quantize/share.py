"""How much of a model a run makes smaller, and what stays float in its blocks, with the reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from fracbit.checkpoint.opened import Opened
from fracbit.pipeline.quantize.schedule import Decision, LayerItem, Schedule
from fracbit.records.run import Share


def share_of(opened: Opened, schedule: Schedule) -> Share:
    """Count what `schedule` quantizes against the model's skeleton; tensors that are shared count once."""
    model = opened.model
    small = {
        id(model.get_parameter(item.name))
        for items in schedule.shards.values()
        for item in items
        if isinstance(item, LayerItem)
    }
    prefix, everything, quantized = f"{opened.family.blocks}.", 0, 0
    matrices, inside, left = 0, 0, defaultdict[str, int](int)
    reasons: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        size, is_small = parameter.numel(), id(parameter) in small
        everything += size
        quantized += size * is_small
        if not name.startswith(prefix) or parameter.dim() < 2:
            continue
        matrices += size
        inside += size * is_small
        if not is_small:
            short = re.sub(r"\.\d+(?=\.|$)", ".*", name[len(prefix) :].partition(".")[2])
            left[short] += size
            reasons.setdefault(short, _why(name, opened, schedule.decisions))
    largest = sorted(left.items(), key=lambda item: -item[1])
    return Share(
        blocks=inside / max(matrices, 1),
        parameters=quantized / max(everything, 1),
        kept_float=tuple((name, size / matrices, reasons[name]) for name, size in largest),
    )


def _why(name: str, opened: Opened, decisions: Mapping[str, Decision]) -> str:
    """Why a matrix of a block stays float."""
    layer = name.removesuffix(".weight")
    if layer in decisions:
        return decisions[layer].reason
    short = layer.removeprefix(f"{opened.family.blocks}.").partition(".")[2]
    return opened.family.keep_float.get(short, "not a linear")
