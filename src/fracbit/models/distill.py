"""Self-distillation: the whole quantized model is trained to give the float model's next-token distribution.

Everything that the format stores is learned at once: codes (through latent weights), scales, offsets, tables, 16-bit columns
and norms, by the divergence KL(float || quantized) on calibration tokens. No labels are needed, so text that the float model
wrote itself will do. The whole model must fit into memory three times over; block-wise corrections need less.

Ref: learned rounding and scales, arXiv:1902.08153; distillation for quantization without data, arXiv:2305.17888 (LLM-QAT); as a
last stage after GPTQ-like fitting, arXiv:2401.06118 (AQLM), arXiv:2405.14852 (PV-tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.models.blocks import bias_of, weight_of
from fracbit.models.install import replace
from fracbit.models.soft import SoftLinear
from fracbit.models.train import rate_at
from fracbit.numerics.packed import PackedTensor

SCALE_RATE = 0.3  # of the latent rate: a scale moves every weight of its block
NORM_RATE = 0.3


@dataclass(frozen=True)
class Distillation:
    """How long and how fast to train. `rate` is Adam's, for latent weights in units of their block's scale.

    `kind`: the type that norms are stored in; they are judged as they are stored.
    """

    epochs: int = 10
    rate: float = 2e-3
    batch: int = 4
    held_out: float = 0.1
    seed: int = 0
    kind: torch.dtype = torch.float32


@dataclass(frozen=True)
class Distilled:
    """The loss in nats per token on held-out samples, before and after; epochs kept (0: none helped)."""

    before: float
    after: float
    epochs: int


def soften(
    model: PreTrainedModel, packed: Mapping[str, PackedTensor], rewritten: bool = False
) -> dict[str, SoftLinear]:
    """Replace the named linears of a float `model` by trainable stand-ins of their packed forms; all else is frozen.

    The float weights place the latent weights inside the cells of the chosen codes. Where weights were `rewritten` before they
    were quantized, the model's own are of no use, and latent weights start on the codes.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    soft: dict[str, SoftLinear] = {}
    for name, tensor in packed.items():
        module = model.get_submodule(name)
        soft[name] = SoftLinear(tensor, None if rewritten else weight_of(module), bias_of(module))
        replace(model, name, soft[name])
    return soft


def distill(
    teacher: PreTrainedModel | None,
    student: PreTrainedModel,
    soft: Mapping[str, SoftLinear],
    norms: Mapping[str, nn.Parameter],
    ids: Tensor,
    how: Distillation,
    show: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Train the `soft` linears and `norms` of `student`, in place, on `ids` [samples, tokens]; the best epoch is kept.

    The loss is the divergence from `teacher`, or without one that of predicting the text itself. `show` is called with each
    epoch and its held-out loss.
    """
    # Samples to train on and samples to judge by, an optimizer, and its schedule.
    held = max(1, int(len(ids) * how.held_out)) if len(ids) > 1 else 0
    train, judge = (
        ids[: len(ids) - held],
        ids[len(ids) - held :] if held else ids,
    )  # [train, tokens], [held, tokens]
    for parameter in norms.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(_groups(soft, norms, how.rate), betas=(0.9, 0.95))
    steps = how.epochs * -(-len(train) // how.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / max(steps, 1)))
    generator = torch.Generator().manual_seed(how.seed)
    # Epochs; the state of the best one is put back.
    before = best = divergence(teacher, student, judge, how.batch)
    kept, state = 0, _state(soft, norms)
    for epoch in range(1, how.epochs + 1):
        for rows in torch.randperm(len(train), generator=generator).split(how.batch):
            loss = _loss(teacher, student, train[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
        exact = _state({}, norms)
        _restore({}, norms, [tensor.to(how.kind).to(tensor.dtype) for tensor in exact])
        found = divergence(teacher, student, judge, how.batch)
        if show is not None:
            show(epoch, found)
        if found < best:
            best, kept, state = found, epoch, _state(soft, norms)
        _restore({}, norms, exact)
    _restore(soft, norms, state)
    return Distilled(before, best, kept)


def divergence(teacher: PreTrainedModel | None, student: PreTrainedModel, ids: Tensor, batch: int) -> float:
    """Mean loss of the student in nats per token over `ids` [samples, tokens]."""
    with torch.no_grad():
        parts = [(float(_loss(teacher, student, part)), len(part)) for part in ids.split(batch)]
    return sum(loss * count for loss, count in parts) / len(ids)


def _loss(teacher: PreTrainedModel | None, student: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean KL(teacher || student) over `ids` [samples, tokens], or how badly the student predicts them; differentiable."""
    wanted = None
    if teacher is not None:
        with torch.no_grad():
            wanted = (
                teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            )  # [samples, tokens, vocabulary]
    found = (
        student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    )  # [samples, tokens, vocabulary]
    if wanted is None:
        surprise: Tensor = -found[:, :-1].gather(-1, ids[:, 1:, None]).mean()  # of the next id
        return surprise
    divergence: Tensor = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return divergence


def _groups(
    soft: Mapping[str, SoftLinear], norms: Mapping[str, nn.Parameter], rate: float
) -> list[dict[str, object]]:
    latent = [layer.latent for layer in soft.values()]
    scales = [
        p for layer in soft.values() for n, p in layer.named_parameters() if n != "latent" and p.requires_grad
    ]
    groups: list[dict[str, object]] = [
        {"params": latent, "lr": rate},
        {"params": scales, "lr": rate * SCALE_RATE},
        {"params": list(norms.values()), "lr": rate * NORM_RATE},
    ]
    return [group for group in groups if group["params"]]


def _state(soft: Mapping[str, SoftLinear], norms: Mapping[str, nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in _all(soft, norms)]


def _restore(soft: Mapping[str, SoftLinear], norms: Mapping[str, nn.Parameter], state: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(_all(soft, norms), state, strict=True):
            parameter.copy_(tensor)


def _all(soft: Mapping[str, SoftLinear], norms: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    return [p for layer in soft.values() for p in layer.parameters()] + list(norms.values())
