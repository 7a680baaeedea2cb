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

from fracbit.errors import SourceError
from fracbit.models.blocks import fused_experts


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`, x [tokens, width]."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: nn.Module) -> None:
        """gate_up [2 inner, width] with the gate's rows first; down [width, inner]."""
        super().__init__()
        gate, up = gate_up.chunk(2)
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
        total = torch.zeros_like(x)
        for index in torch.unique(chosen).tolist():
            token, slot = torch.where(chosen == index)
            part = self[int(index)](x[token]) * shares[token, slot, None]
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

    Returns the paths that were split, empty for a dense model. Raises SourceError for a layout that this
    rewrite would get wrong (transposed or interleaved tensors, biases, a gate of its own).
    """
    found = fused_experts(model)
    for path, module in found:
        _check(path, module)
    for path, module in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _split(module))
    return [path for path, _ in found]


def _split(module: Any) -> SplitExperts:
    pairs = zip(module.gate_up_proj, module.down_proj, strict=True)
    return SplitExperts([Expert(gate_up, down, module.act_fn) for gate_up, down in pairs])


def _check(path: str, module: nn.Module) -> None:
    """The flags are set by transformers' `use_experts_implementation`; a class without them is of an unknown
    layout.
    """
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    odd = [name for name, value in wanted.items() if getattr(module, name, None) is not value]
    gate = getattr(type(module), "_apply_gate", None)
    if odd or getattr(gate, "__name__", "") != "_default_apply_gate":
        raise SourceError(
            f"the experts at {path} ({type(module).__name__}) are stored in a layout that cannot be split "
            f"into gate, up and down ({', '.join(odd) or 'a gate of its own'}); "
            "quantize a model whose experts transformers keeps as plain gate_up_proj and down_proj."
        )
