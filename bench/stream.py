"""How fast, and in how much memory, a checkpoint of 7B shape is quantized, beside plain copying of the same files.

    python bench/stream.py --work FOLDER [--dtype int --bits 4 --block 64] [--blocks 32] [--json bench/results/stream.json]
    python bench/stream.py --work FOLDER --size 3.5GB --json bench/results/planned.json

The first makes the figures at 7B shape in README.md, docs/guide.md (memory and speed) and docs/importance.md (what planning
costs). The second makes the divided budget of docs/importance.md: with `--size`, `fracbit plan` divides it first, and the run
is set beside what the plan said it would need.

Makes a Llama of 7B shape with random bf16 weights (13 GB; `--blocks` makes it smaller) in FOLDER, copies its weight files
with the same flush to disk that fracbit does (not with `--size`), and runs `fracbit quantize` on it in a process of its own.
Rates are MB of source per second of wall clock; memory is the process's peak resident size as the kernel accounts it, mapped
files included.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from frame import Row, arguments, fracbit, machine, write_json
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000


def make_model(folder: Path, blocks: int) -> None:
    """Write the checkpoint, one shard every four blocks and one for the rest; nothing is done when it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=32,
        vocab_size=VOCABULARY, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(VOCABULARY * WIDTH + len(shapes), generator=generator) * 0.02).bfloat16()
    shards: dict[str, dict[str, int]] = {}
    for number, name in enumerate(shapes):
        block = re.search(r"layers\.(\d+)\.", name)
        shard = f"model-{int(block[1]) // 4 + 1:05}.safetensors" if block else "model-ends.safetensors"
        shards.setdefault(shard, {})[name] = number
    for shard, names in shards.items():
        tensors = {name: weight(source, shapes[name], number) for name, number in names.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def weight(source: torch.Tensor, shape: torch.Size, number: int) -> torch.Tensor:
    """Noise, another part of it for each matrix; ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return source[number:][: shape.numel()].view(shape).clone()


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weight files and flush them."""
    target.mkdir(parents=True)
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def plan(source: Path, size: str, recipe: Path) -> Row:
    """What `fracbit plan` says of a budget; the recipe is written."""
    found, ran = fracbit("plan", source, "--size", size, "-o", recipe)
    planned = next(each for each in found["candidates"] if each["name"] == "exact")
    needs = {f"predicted_megabytes_of_{of}": found["needs"][f"{of}_bytes"] / 1e6 for of in ("memory", "disk")}
    return {
        "scheme": f"planned for {size}", "plan_seconds": ran.seconds,
        "planned_output_megabytes": planned["file_bytes"] / 1e6, "planned_bits_per_weight": planned["bits_per_weight"],
        **needs, "predicted_seconds": found["needs"]["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, work=None, json=None)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--dtype", default="int")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--block", default="64")
    parser.add_argument("--size", help="of all weight files, such as 3.5GB: plan it, then carry the plan out")
    given = parser.parse_args()
    source, target = given.work / f"llama-{given.blocks}", given.work / "quantized"
    # In a process of its own: the memory of this one would count as that of the processes that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        apart.submit(make_model, source, given.blocks).result()
    megabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e6
    recipe = given.work / "plan.toml"
    if given.size:
        beside, how = plan(source, given.size, recipe), [recipe]
    else:
        rate = megabytes / copy(source, given.work / "copied")
        beside = {"scheme": f"{given.dtype}{given.bits}/{given.block}", "copy_megabytes_per_second": rate}
        how = ["--scheme", beside["scheme"]]
    printed, ran = fracbit("quantize", source, *how, "-o", target, "--overwrite")
    shutil.rmtree(target)
    result = {
        "source_megabytes": megabytes, **beside, "bits_per_weight": printed["bits_per_weight"],
        "output_megabytes": printed["bytes"] / 1e6, "quantize_megabytes_per_second": megabytes / ran.seconds,
        "seconds": ran.seconds, "peak_resident_megabytes": ran.peak_rss_bytes / 1e6,
        "processors_used": ran.cpu_seconds / ran.seconds, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps({**result, "machine": machine()}, indent=1))
    write_json(given.json, result)


if __name__ == "__main__":
    main()
