"""How each peer quantizes a model. quality.py, gptq_speed.py and real/measure.py run it in the peer's environment.

    python quantize.py NAME MODEL IDS.npy FOLDER SETTINGS.json

SETTINGS.json is a list of objects, each `{"label": ..., "bits": ..., "group": ..., ...}`; one folder FOLDER/LABEL per setting
gets `weights.safetensors` (the dequantized linears, [out, in], by their names in the model) and `facts.json` (stored bytes per
linear, seconds, peak resident bytes, versions). With `"keep": true` the peer's own checkpoint stays there, and no weights are
written: for timings.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from frame import versions
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Weights = dict[str, torch.Tensor]
Made = tuple[Weights, dict[str, int]]
"""Dequantized weights, and stored bytes, of each linear that was quantized."""


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears of the blocks of a Hugging Face Llama."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def stored_tensors(folder: Path) -> Weights:
    """Everything in the safetensors files of a checkpoint."""
    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 not a dict
    return found


def stored_bytes(tensors: Weights, names: list[str], left_out: str) -> dict[str, int]:
    """Bytes of the tensors below each linear's name; those called `left_out` say nothing that was learned."""
    sizes = dict.fromkeys(names, 0)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in sizes and part not in (left_out, "bias"):
            sizes[layer] += tensor.numel() * tensor.element_size()
    return sizes


def autoround(model: str, ids: torch.Tensor, setting: dict, place: Path) -> Made:
    """AutoRound; settings: sym, iters."""
    from auto_round import AutoRound

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = list(linears(loaded))
    method = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), bits=setting["bits"], group_size=setting["group"],
        sym=setting["sym"], iters=setting["iters"], nsamples=len(ids), seqlen=ids.shape[1],
        dataset=[row[None] for row in ids], batch_size=8, device_map="cpu", enable_torch_compile=False, seed=0,
    )  # fmt: skip
    done, _ = method.quantize()
    # Cloned, since packing replaces the layers. One without a scale was left float: the bench counts it at 16 bits.
    layers = {name: done.get_submodule(name) for name in names}
    packed = {name: layer for name, layer in layers.items() if getattr(layer, "scale", None) is not None}
    weights = {name: layer.weight.detach().float().clone() for name, layer in packed.items()}
    # Not "auto_round": at 4 bits with zero points that takes a packing for AWQ, which fails in this version.
    method.save_quantized(str(place), format="auto_gptq")
    return weights, stored_bytes(stored_tensors(place), list(weights), "g_idx")


def hqq(model: str, ids: torch.Tensor, setting: dict, place: Path) -> Made:
    """HQQ, which looks at no data; settings: axis."""
    from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights, sizes = {}, {}
    for name, layer in linears(loaded).items():
        config = hqq_base_quant_config(setting["bits"], group_size=setting["group"], axis=setting["axis"])
        done = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        scale, zero = done.meta["scale"], done.meta["zero"]
        assert torch.isfinite(scale).all() and torch.isfinite(zero).all()
        weights[name] = Quantizer.dequantize(done.W_q, done.meta)
        # Scales and zeros are computed with here in fp32; HQQ stores them in the compute type, 16 bits in use.
        sizes[name] = done.W_q.numel() * done.W_q.element_size() + 2 * (scale.numel() + zero.numel())
    return weights, sizes


def gptqmodel(model: str, ids: torch.Tensor, setting: dict, place: Path) -> Made:
    """GPTQModel's GPTQ; settings: sym, mse (0: none)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=setting["bits"], group_size=setting["group"], sym=setting.get("sym", True), desc_act=False,
        damp_percent=0.01, mse=setting.get("mse", 0.0), device="cpu", offload_to_disk=False,
    )  # fmt: skip
    loaded = GPTQModel.load(model, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    loaded.quantize(rows, batch_size=8)
    loaded.save(str(place))
    if setting.get("keep"):
        return {}, {}
    stored = stored_tensors(place)
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    weights = {name: gptq_weight(stored, name, setting["bits"]) for name in names}
    return weights, stored_bytes(stored, names, "g_idx")


def gptq_weight(stored: Weights, name: str, bits: int) -> torch.Tensor:
    index = stored[f"{name}.g_idx"].long()
    scales = stored[f"{name}.scales"].float()  # [groups, out]
    codes = unpacked(stored[f"{name}.qweight"].T, bits)[:, : len(index)].T  # [in, out]
    zeros = unpacked(stored[f"{name}.qzeros"], bits)[:, : scales.shape[1]]
    zeros = (zeros + 1) % 2**bits  # the format stores zero points minus one
    return ((codes - zeros[index]) * scales[index]).T


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """A dense stream of fields, least significant bit first: int32 [rows, words] -> float [rows, words * 32 / bits]."""
    rows = words.contiguous().to(torch.int64) & 0xFFFFFFFF
    stream = ((rows[:, :, None] >> torch.arange(32)) & 1).flatten(1)  # [rows, words * 32]
    count = stream.shape[1] // bits
    fields = stream[:, : count * bits].view(len(rows), count, bits)
    return (fields << torch.arange(bits)).sum(-1).float()


def llmcompressor(model: str, ids: torch.Tensor, setting: dict, place: Path) -> Made:
    """llm-compressor's GPTQ; settings: sym, observer, and group_down for the layer whose input the group does not divide."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    def part(targets: str, group: int) -> dict:
        how = {"symmetric": setting.get("sym", True), "strategy": "group", "group_size": group}
        own = {"observer": setting["observer"]} if "observer" in setting else {}
        return {"targets": [targets], "weights": {"num_bits": setting["bits"], "type": "int", **how, **own}}

    group = setting["group"]
    most = part(r"re:.*(q|k|v|o|gate|up)_proj$", group)
    down = part(r"re:.*down_proj$", setting.get("group_down", group))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    recipe = GPTQModifier(
        config_groups={"most": most, "down": down}, ignore=["lm_head"], actorder="static", dampening_frac=0.01
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=loaded, dataset=rows, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False, batch_size=8,
    )  # fmt: skip
    loaded.save_pretrained(place, save_compressed=True)
    if setting.get("keep"):
        return {}, {}
    stored = stored_tensors(place)
    names = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    weights = {name: compressed_weight(stored, name, setting["bits"]) for name in names}
    return weights, stored_bytes(stored, names, "weight_shape")


def compressed_weight(stored: Weights, name: str, bits: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

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


GGUF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def llamacpp(model: str, ids: torch.Tensor, setting: dict, place: Path) -> Made:
    """llama.cpp with an importance matrix; settings: type. A layer whose width that type does not divide gets another."""
    from gguf import GGUFReader

    place.mkdir(parents=True, exist_ok=True)
    home, threads = Path(sys.prefix) / "llama.cpp", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    plain, text, matrix, made = (
        place / name for name in ("plain.gguf", "text.txt", "imatrix.gguf", "made.gguf")
    )
    text.write_text("".join(AutoTokenizer.from_pretrained(model).batch_decode(ids)))
    convert = [sys.executable, home / "convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", plain]
    observe = [
        home / "build/bin/llama-imatrix",
        "-m",
        plain,
        "-f",
        text,
        "-o",
        matrix,
        "-c",
        ids.shape[1],
        "-t",
        threads,
        "--no-ppl",
    ]
    kept = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    quantize = [
        home / "build/bin/llama-quantize",
        "--imatrix",
        matrix,
        *kept,
        plain,
        made,
        setting["type"],
        threads,
    ]
    for command in (convert, observe, quantize):
        subprocess.run([str(word) for word in command], check=True)
    sizes = {}
    for tensor in GGUFReader(made).tensors:
        block, _, kind = tensor.name.removeprefix("blk.").removesuffix(".weight").partition(".")
        if kind in GGUF_NAMES:
            sizes[f"model.layers.{block}.{GGUF_NAMES[kind]}"] = int(tensor.n_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=made.name, dtype=torch.float32)
    layers = linears(loaded)
    return {name: layers[name].weight.detach() for name in sizes}, sizes


PEERS: dict[str, tuple[str, Callable[[str, torch.Tensor, dict, Path], Made]]] = {
    "gptqmodel": ("gptqmodel", gptqmodel),
    "llmcompressor": ("llmcompressor", llmcompressor),
    "autoround": ("auto-round", autoround),
    "hqq": ("hqq", hqq),
    "llamacpp": ("gguf", llamacpp),
}
"""The package, and (model folder, ids [samples, length], setting, folder for a checkpoint) -> what it makes."""


def main() -> None:
    peer, model, ids, folder, settings = sys.argv[1:]
    (package, run), tokens = PEERS[peer], torch.from_numpy(np.load(ids)).long()
    for setting in json.loads(Path(settings).read_text()):
        place = Path(folder) / setting["label"]
        place.mkdir(parents=True, exist_ok=True)
        facts: dict = {"setting": setting, "versions": versions(package, "torch")}
        started = time.perf_counter()
        try:
            weights, sizes = run(model, tokens, setting, place / "checkpoint")
            facts |= {"seconds": time.perf_counter() - started, "bytes": sizes}
            if not setting.get("keep"):
                floats = {name: weight.float().contiguous() for name, weight in weights.items()}
                save_file(floats, place / "weights.safetensors")
                shutil.rmtree(place / "checkpoint", ignore_errors=True)
        except Exception as error:  # noqa: BLE001 a setting that a peer refuses is a line of the table, not the end of it
            traceback.print_exc()
            facts["error"] = f"{type(error).__name__}: {error}".strip()[:300]
        facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (place / "facts.json").write_text(json.dumps(facts))
        print(setting["label"], facts.get("error") or f"{facts['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
