"""GPTQModel's GPTQ; settings: bits, group, sym, desc_act, mse (0: none)."""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from frame import Sizes, Weights, main, stored_bytes, stored_tensors
from gptqmodel import GPTQModel, QuantizeConfig


def run(model: str, ids: torch.Tensor, setting: dict, folder: Path) -> tuple[Weights, Sizes, list[str]]:
    down = setting.get("group_down")
    config = QuantizeConfig(
        bits=setting["bits"], group_size=setting["group"], sym=setting.get("sym", True),
        desc_act=setting.get("desc_act", False), damp_percent=0.01, mse=setting.get("mse", 0.0), device="cpu",
        offload_to_disk=False, dynamic=None if down is None else {r"+:.*down_proj.*": {"group_size": down}},
    )  # fmt: skip
    loaded = GPTQModel.load(model, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    loaded.quantize(rows, batch_size=setting.get("batch", 8))
    place = folder / "checkpoint"
    loaded.save(str(place))
    if setting.get("keep"):
        return {}, {}, []
    stored = stored_tensors(place)
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    free = () if setting.get("desc_act") and setting["group"] != -1 else ("g_idx",)
    sizes = stored_bytes(stored, names, free)
    shutil.rmtree(place)
    version_1 = True  # the format stores zero points minus one
    return {name: dequantized(stored, name, setting["bits"], version_1) for name in names}, sizes, []


def dequantized(stored: Weights, name: str, bits: int, minus_one: bool) -> torch.Tensor:
    index = stored[f"{name}.g_idx"].long()
    scales = stored[f"{name}.scales"].float()  # [groups, out]
    codes = unpacked(stored[f"{name}.qweight"].T, bits)[:, : len(index)].T  # [in, out]
    zeros = unpacked(stored[f"{name}.qzeros"], bits)[:, : scales.shape[1]]
    zeros = (zeros + 1) % 2**bits if minus_one else zeros
    return ((codes - zeros[index]) * scales[index]).T


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """A dense stream of fields, least significant bit first: int32 [rows, words] -> float [rows, words * 32 / bits]."""
    rows = words.contiguous().to(torch.int64) & 0xFFFFFFFF
    places = (rows[:, :, None] >> torch.arange(32)) & 1  # [rows, words, 32]
    stream = places.flatten(1)
    count = stream.shape[1] // bits
    fields = stream[:, : count * bits].view(len(rows), count, bits)
    return (fields << torch.arange(bits)).sum(-1).float()


if __name__ == "__main__":
    main(run, version("gptqmodel"))
