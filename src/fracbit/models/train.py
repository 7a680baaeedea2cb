"""Training of a block: everything that it stores is moved so that it gives what the float model gives there.

Codes (through latent weights), scales, offsets, tables, 16-bit columns and norms are trained at once by Adam, on the squared
error of the block's output, in the memory of one block and its states. Rounding is part of every forward pass, so a state is
judged as it will be stored; the best one on held-out samples is kept. Norm tweaking is the special case that moves norms alone.

Ref: output of a block, arXiv:2102.05426 (BRECQ); learned rounding with the quantized chain as input and the float model's
states as target, arXiv:2309.05516 (AutoRound); all of a block, arXiv:2407.11062 (EfficientQAT, Block-AP).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fracbit.models.blocks import is_transposed
from fracbit.models.correction import Corrected, Evidence, Tuned, error, norm_parameters, run_batch
from fracbit.models.family import Family
from fracbit.models.soft import SoftLinear
from fracbit.numerics.packed import decode
from fracbit.records.checked import Checked
from fracbit.records.progress import Progress

SCALE_RATE = 0.05  # of the latent rate: a scale moves every weight of its block
NORM_RATE = 0.1
WARM_UP = 0.05  # of all steps
LAST = 0.05  # of the rate, at the end
MEAN = 0.525  # of the rate over all steps


class Train(Checked):
    """Training of a block.

    - `epochs` of all samples that are not held out; `tokens` of a step, in whole samples.
    - `reach`: how far latent weights can go in all, in units of their grid's step (the mean distance of neighbouring values).
      Adam moves each by at most its rate, so the rate follows from the number of updates, as in AutoRound.
    """

    called: ClassVar[str] = "correction train"
    follows: ClassVar[str] = "model"

    epochs: int = Field(4, ge=1)
    reach: float = Field(0.4, gt=0, le=100)
    tokens: int = Field(1024, ge=1)

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Train the linears that were quantized, and the norms."""
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        soft = {
            name: SoftLinear(packed, evidence.weights[name], None) for name, packed in evidence.packed.items()
        }
        norms = {name: Tuned(p, evidence.kind) for name, p in norm_parameters(block, family).items()}
        student = _Student(block, soft, norms)
        before, after, epoch = self._fit(student, evidence, show)
        if not epoch:
            return Corrected(before, before, "none")
        for norm in student.norms.values():
            norm.store()
        return Corrected(before, after, f"epoch {epoch}", {n: layer.packed() for n, layer in soft.items()})

    def _fit(self, student: _Student, evidence: Evidence, show: Progress) -> tuple[float, float, int]:
        """Relative error before and after, and the best epoch, whose state the student has; 0 where none helped."""
        steps = self.epochs * len(evidence.train)
        optimizer = torch.optim.Adam(student.groups(self.reach / (MEAN * steps)), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / max(steps, 1)))
        generator = torch.Generator().manual_seed(evidence.seed)
        before = best = error(student.block, evidence, student.stored(), weigh)
        kept, state = 0, student.state()
        for epoch in range(1, self.epochs + 1):
            for place in torch.randperm(len(evidence.train), generator=generator).tolist():
                loss = _loss(student, evidence, evidence.train[place])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            found = error(student.block, evidence, student.stored(), weigh)
            show(f"training, error {found:.4f}", epoch, self.epochs)
            if found < best:
                best, kept, state = found, epoch, student.state()
        student.restore(state)
        return before, best, kept


@dataclass(frozen=True, eq=False)
class _Student:
    """A quantized block with trainable stand-ins: `soft` for its linears, `norms` for the parameters of its norms."""

    block: nn.Module
    soft: Mapping[str, SoftLinear]
    norms: Mapping[str, Tuned]

    def values(self) -> dict[str, Tensor]:
        """Every parameter that is trained as the block reads it, differentiable."""
        return self._as_read({name: layer.weight() for name, layer in self.soft.items()})

    def stored(self) -> dict[str, Tensor]:
        """The same as it will be stored, without gradients."""
        with torch.no_grad():
            return self._as_read({name: decode(layer.packed()) for name, layer in self.soft.items()})

    def _as_read(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norms, and `weights` [out, in] in the type and orientation of their modules."""
        found: dict[str, Tensor] = {name: norm.value() for name, norm in self.norms.items()}
        for name, weight in weights.items():
            module = self.block.get_submodule(name)
            kind = module.get_parameter("weight").dtype
            found[f"{name}.weight"] = (weight.T if is_transposed(module) else weight).to(kind)
        return found

    def groups(self, rate: float) -> list[dict[str, object]]:
        """The parameters with their rates; `rate` is that of latent weights in steps of their grid."""
        found: list[dict[str, object]] = []
        for layer in self.soft.values():
            values = layer.base.table.values  # [1 or out, levels]
            step = float((values[:, -1] - values[:, 0]).mean()) / (values.shape[1] - 1)
            rest = [
                parameter
                for name, parameter in layer.named_parameters()
                if name != "latent" and parameter.requires_grad and parameter.numel()
            ]
            found.append({"params": [layer.latent], "lr": rate * step})
            found.append({"params": rest, "lr": rate * step * SCALE_RATE})
        changes = [norm.change for norm in self.norms.values()]
        return [*found, {"params": changes, "lr": rate * NORM_RATE}] if changes else found

    def state(self) -> list[Tensor]:
        """A copy of everything that is trained."""
        return [parameter.detach().clone() for parameter in self._parameters()]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Put a copy back."""
        with torch.no_grad():
            for parameter, tensor in zip(self._parameters(), state, strict=True):
                parameter.copy_(tensor)

    def _parameters(self) -> Iterator[Tensor]:
        for layer in self.soft.values():
            yield from layer.parameters()
        for norm in self.norms.values():
            yield norm.change


def _loss(student: _Student, evidence: Evidence, number: int) -> Tensor:
    """Weighted squared error of the block's output on a batch."""
    batch = evidence.entrance.batches[number]
    wanted = evidence.exits[batch.start : batch.stop].float()  # [samples, tokens, width]
    found = run_batch(student.block, evidence, number, student.values())  # [samples, tokens, width]
    wrong = (found.float() - wanted.to(found.device)).square() * weigh(wanted).to(found.device)
    return wrong.mean()


def weigh(wanted: Tensor) -> Tensor:
    """The weight [samples, tokens, 1] of each token's squared error, from the states [samples, tokens, width] it should have.

    A few tokens of most models have states a thousand times as large as all others, and the norm of the next block divides by
    that size. Plain squared errors would train the block for those tokens alone. Errors relative to the size would spoil them,
    and attention rests on them. The geometric mean of both lost least (docs/LOG.md).
    """
    return wanted.float().square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def rate_at(share: float) -> float:
    """The rate after a `share` of all steps: a short rise, then half a cosine down to a twentieth."""
    if share < WARM_UP:
        return LAST + (1 - LAST) * share / WARM_UP
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))
