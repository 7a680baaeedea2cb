"""HQQ: data-free; settings: bits, group, axis, and group_down for the layer whose input the group does not divide."""

from importlib.metadata import version
from pathlib import Path

import torch
from frame import Sizes, Weights, linears, main
from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config
from transformers import AutoModelForCausalLM


def run(model: str, ids: torch.Tensor, setting: dict, folder: Path) -> tuple[Weights, Sizes, list[str]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights: Weights = {}
    sizes: Sizes = {}
    for name, layer in linears(loaded).items():
        group = setting.get("group_down", setting["group"]) if "down_proj" in name else setting["group"]
        config = hqq_base_quant_config(setting["bits"], group_size=group, axis=setting["axis"])
        done = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        parts = (done.W_q, done.meta["scale"], done.meta["zero"])
        weights[name] = Quantizer.dequantize(done.W_q, done.meta)
        # Scales and zeros are computed with here in fp32; HQQ stores them in the compute type, 16 bits in use.
        sizes[name] = parts[0].numel() * parts[0].element_size() + 2 * (parts[1].numel() + parts[2].numel())
        for key in ("scale", "zero"):
            assert torch.isfinite(done.meta[key]).all()
    return weights, sizes, []


if __name__ == "__main__":
    main(run, version("hqq"))
