"""AutoRound; settings: bits, group, sym, iters, and group_down for a layer whose input the group does not divide."""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from frame import Sizes, Weights, linears, main, stored_bytes, stored_tensors
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
    # Cloned, since packing replaces the layers. One without a scale was left float: the bench counts it at 16 bits.
    layers = {name: done.get_submodule(name) for name in names}
    weights = {
        n: m.weight.detach().float().clone()
        for n, m in layers.items()
        if getattr(m, "scale", None) is not None
    }
    place = folder / "checkpoint"
    # Not "auto_round": at 4 bits with zero points that takes a packing for AWQ, which fails in this version.
    method.save_quantized(str(place), format="auto_gptq")
    sizes = stored_bytes(stored_tensors(place), list(weights), ("g_idx",))
    shutil.rmtree(place)
    return weights, sizes, []


if __name__ == "__main__":
    main(run, version("auto-round"))
