"""Mixtures of experts as linears: the two fused tensors of a block are split into one small MLP per expert.

transformers 5 stores `gate_up_proj [experts, 2 inner, width]` and `down_proj [experts, width, inner]` and
multiplies them in one grouped product. Quantizing needs each expert's own matrix and its own inputs (the
tokens routed to it), so the module is replaced by `SplitExperts`: same inputs, same output, linears named
`<n>.gate_proj`, `<n>.up_proj`, `<n>.down_proj`, which are also the names on disk of Qwen's and most other
mixtures.

Ref: transformers 5, integrations/moe.py (the reference loop over experts).
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from fracbit.models.blocks import fused_experts
from fracbit.models.install import replace


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`, x [tokens, width]."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: nn.Module) -> None:
        """gate_up [2 inner, width] with the gate's rows first; down [width, inner]."""
        super().__init__()
        gate, up = gate_up.chunk(2)  # [inner, width]
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One expert's output [tokens, width] for x [tokens, width]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class SplitExperts(nn.ModuleList):
    """The experts of one block, called as the fused module is."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The mixed output [tokens, width] for x [tokens, width].

        chosen: the experts of each token by number [tokens, top]; shares: their weights [tokens, top].
        """
        total = torch.zeros_like(x)  # [tokens, width]
        for index in torch.unique(chosen).tolist():
            token, slot = torch.where(chosen == index)  # [routed]
            part = self[int(index)](x[token]) * shares[token, slot, None]  # [routed, width]
            total.index_add_(0, token, part.to(total.dtype))
        return total


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear without bias around `weight` [out, in], which is copied (a view would keep all experts in
    memory).
    """
    out, width = weight.shape
    linear = nn.Linear(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear


def split_experts(model: nn.Module) -> list[str]:
    """Replace every fused mixture in the model, in place, by `SplitExperts`; works on the meta device too.

    Returns the paths that were split, empty for a dense model. A mixture that is stored otherwise (transposed
    or interleaved tensors, biases, a gate of its own: GPT-OSS) is left as it is and stays float; `discover`
    notes it.
    """
    paths = [path for path, module in fused_experts(model) if _is_plain(module)]
    for path in paths:  # by path: no more than one mixture may be in memory twice
        replace(model, path, _split(model.get_submodule(path)))
    return paths


def without_fusing(rules: list[Any]) -> list[Any]:
    """Transformers' loading rules without those that would fuse the experts of a checkpoint, for a split model.

    transformers calls the rules weight conversions (`HfQuantizer.update_weight_conversions`); renamings stay.
    """
    return [rule for rule in rules if not is_fusing(rule)]


def is_fusing(rule: Any) -> bool:
    """Whether a loading rule gathers the linears of all experts into one tensor."""
    return isinstance(rule, WeightConverter) and any(
        target.endswith((".gate_up_proj", ".down_proj")) for target in rule.target_patterns
    )


def _split(module: Any) -> SplitExperts:
    pairs = zip(module.gate_up_proj, module.down_proj, strict=True)
    return SplitExperts([Expert(gate_up, down, module.act_fn) for gate_up, down in pairs])


def _is_plain(module: nn.Module) -> bool:
    """Rows of the gate first, then of up, no bias, the usual gate; transformers' decorator sets the flags."""
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    gate = getattr(type(module), "_apply_gate", None)
    return all(getattr(module, name, None) is value for name, value in wanted.items()) and (
        getattr(gate, "__name__", "") == "_default_apply_gate"
    )
