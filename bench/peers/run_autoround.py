"""AutoRound; settings: bits, group, sym, iters, and group_down for a layer whose input the group does not divide."""

from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from frame import Sizes, Weights, linears, main
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(model: str, ids: torch.Tensor, setting: dict, folder: Path) -> tuple[Weights, Sizes, list[str]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    down = setting.get("group_down")
    names = list(linears(loaded))
    special = {n: {"bits": setting["bits"], "group_size": down} for n in names if down and "down_proj" in n}
    method = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), bits=setting["bits"], group_size=setting["group"],
        sym=setting.get("sym", True), iters=setting["iters"], nsamples=len(ids), seqlen=ids.shape[1],
        dataset=[row[None] for row in ids], batch_size=8, device_map="cpu", enable_torch_compile=False,
        layer_config=special or None, seed=0,
    )  # fmt: skip
    done, _ = method.quantize()
    weights: Weights = {}
    sizes: Sizes = {}
    for name in names:
        layer = done.get_submodule(name)
        if getattr(layer, "scale", None) is None:
            continue  # left float: the bench counts it at 16 bits
        weights[name] = layer.weight.detach().float()
        scale = layer.scale
        count = layer.weight.numel()
        groups = scale.numel()
        # As its checkpoints store it: packed codes, 16-bit scales, packed zero points also where they are symmetric.
        sizes[name] = (count * setting["bits"] + groups * (16 + setting["bits"]) + 7) // 8
    return weights, sizes, []


if __name__ == "__main__":
    main(run, version("auto-round"))
