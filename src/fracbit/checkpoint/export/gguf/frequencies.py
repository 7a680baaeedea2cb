"""Factors of rotary frequencies that llama.cpp reads as tensors, since their kind of scaling has no key in its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fracbit.checkpoint.export.gguf.size_keys import head_size, positions, scaling


def _llama3(config: PreTrainedConfig) -> dict[str, Tensor]:
    """By how much every frequency is divided, as transformers computes it. Ref: Llama 3.1's scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.to_dict()
    size, base = head_size(settings), float(positions(settings)["rope_theta"])
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)  # [head size / 2]
    return {"rope_freqs.weight": plain / frequencies}


def _longrope(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Those of long and of short texts, which stand in the config. Ref: LongRoPE, arXiv:2402.13753."""
    how = positions(config.to_dict())
    return {
        f"rope_factors_{name}.weight": torch.tensor(how[f"{name}_factor"], dtype=torch.float32)
        for name in ("long", "short")
    }


FACTORS: Mapping[str, Callable[[PreTrainedConfig], dict[str, Tensor]]] = {
    "llama3": _llama3,
    "longrope": _longrope,
}


def frequency_factors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """The factors fp32 [rotated / 2] by their name in the file; none for other scalings."""
    kind = scaling(config.to_dict())
    return FACTORS[kind](config) if kind in FACTORS else {}
