"""llm-compressor's GPTQ; settings: bits, group, sym, order, group_down for a layer whose input the group does not divide."""

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from datasets import Dataset
from frame import Sizes, Weights, main, stored_bytes, stored_tensors
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def args(setting: dict, group: int) -> dict:
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    symmetric = setting.get("sym", True)
    weights = {"num_bits": setting["bits"], "type": "int", "symmetric": symmetric, **strategy}
    if setting.get("observer"):
        weights["observer"] = setting["observer"]
    return {"weights": weights}


def groups(setting: dict) -> dict:
    down = setting.get("group_down")
    if down is None:
        return {"all": {"targets": ["Linear"], **args(setting, setting["group"])}}
    most = {"targets": [r"re:.*(q|k|v|o|gate|up)_proj$"], **args(setting, setting["group"])}
    return {"most": most, "down": {"targets": [r"re:.*down_proj$"], **args(setting, down)}}


def run(model: str, ids: torch.Tensor, setting: dict, folder: Path) -> tuple[Weights, Sizes, list[str]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    recipe = GPTQModifier(
        config_groups=groups(setting), ignore=["lm_head"], actorder=setting.get("order", "static"),
        dampening_frac=0.01,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=loaded, dataset=rows, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False, batch_size=setting.get("batch", 8),
    )  # fmt: skip
    loaded.save_pretrained(folder / "checkpoint", save_compressed=True)
    if setting.get("keep"):
        return {}, {}, []
    stored = stored_tensors(folder / "checkpoint")
    names = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    sizes = stored_bytes(stored, names, ("weight_shape",))
    return {name: dequantized(stored, name, setting["bits"]) for name in names}, sizes, []


def dequantized(stored: Weights, name: str, bits: int) -> torch.Tensor:
    shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
    codes = unpack_from_int32(stored[f"{name}.weight_packed"], bits, shape).float()
    scale = stored[f"{name}.weight_scale"].float()
    width = -(-shape[1] // scale.shape[1])
    zero = stored.get(f"{name}.weight_zero_point")
    if zero is not None:
        if zero.dtype == torch.int32:
            zero = unpack_from_int32(zero, bits, torch.Size([shape[0], scale.shape[1]]), packed_dim=0)
        codes = codes - zero.float().repeat_interleave(width, 1)[:, : shape[1]]
    return codes * scale.repeat_interleave(width, 1)[:, : shape[1]]


if __name__ == "__main__":
    main(run, version("llmcompressor"))
