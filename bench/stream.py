"""How fast, and in how much memory, a checkpoint of 7B shape is quantized, beside plain copying of the same files.

    python bench/stream.py --work FOLDER [--dtype int --bits 4 --block 64] [--blocks 32] [-o bench/results/stream.json]
    python bench/stream.py --work FOLDER --size 3.5GB -o bench/results/planned.json

With `--size`, `fracbit plan` divides that budget first, and the run is set beside what the plan said it would need.

Makes a Llama of 7B shape with random bf16 weights (13 GB; `--blocks` makes it smaller) in FOLDER, copies its weight files
with the same flush to disk that fracbit does (not with `--size`), and runs `fracbit quantize` on it in a process of its own.
Rates are MB of source per second of wall clock; memory is the process's peak resident size as the kernel accounts it, mapped
files included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000


def make_model(folder: Path, blocks: int) -> None:
    """Write the checkpoint, one shard every four blocks; nothing is done when it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(INNER * WIDTH, generator=generator) * 0.02).bfloat16()

    def weight(out: int, inputs: int, number: int) -> torch.Tensor:
        return source.roll(number)[: out * inputs].view(out, inputs).clone()

    weight_map: dict[str, str] = {}

    def save(shard: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    for first in range(0, blocks, 4):
        tensors: dict[str, torch.Tensor] = {}
        for block in range(first, min(first + 4, blocks)):
            name = f"model.layers.{block}"
            for number, part in enumerate(("q", "k", "v", "o")):
                tensors[f"{name}.self_attn.{part}_proj.weight"] = weight(WIDTH, WIDTH, 7 * block + number)
            tensors[f"{name}.mlp.gate_proj.weight"] = weight(INNER, WIDTH, 7 * block + 4)
            tensors[f"{name}.mlp.up_proj.weight"] = weight(INNER, WIDTH, 7 * block + 5)
            tensors[f"{name}.mlp.down_proj.weight"] = weight(WIDTH, INNER, 7 * block + 6)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{name}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        save(f"model-{first // 4 + 1:05}.safetensors", tensors)
    table = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02).bfloat16()
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save("model-ends.safetensors", ends | {"model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": blocks, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


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


def run(*command: str) -> tuple[dict[str, Any], float, resource.struct_rusage]:
    """What a command of fracbit prints as JSON, its seconds, and what the kernel accounts to its process alone."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fracbit", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fracbit {command[0]} failed")
    return json.loads(printed), time.perf_counter() - started, usage


def plan(source: Path, size: str, recipe: Path) -> dict[str, object]:
    """What `fracbit plan` says of a budget; the recipe is written."""
    found, seconds, _ = run("plan", str(source), "--size", size, "-o", str(recipe), "--json")
    planned = next(each for each in found["candidates"] if each["name"] == "exact")
    return {
        "scheme": f"planned for {size}",
        "plan_seconds": seconds,
        "planned_output_megabytes": planned["file_bytes"] / 1e6,
        "planned_bits_per_weight": planned["bits_per_weight"],
        "predicted_megabytes_of_memory": found["needs"]["memory_bytes"] / 1e6,
        "predicted_megabytes_of_disk": found["needs"]["disk_bytes"] / 1e6,
        "predicted_seconds": found["needs"]["seconds"],
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--dtype", default="int")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--block", default="64")
    parser.add_argument(
        "--size", help="of all weight files, such as 3.5GB: plan first, then carry the plan out"
    )
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    source, target = given.work / f"llama-{given.blocks}", given.work / "quantized"
    with ProcessPoolExecutor(
        1, get_context("spawn")
    ) as apart:  # its memory would count as that of the processes after it
        apart.submit(make_model, source, given.blocks).result()
    megabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e6
    recipe = given.work / "plan.toml"
    if given.size:
        beside, how = plan(source, given.size, recipe), [str(recipe)]
    else:
        rate = megabytes / copy(source, given.work / "copied")
        beside = {"scheme": f"{given.dtype}{given.bits}/{given.block}", "copy_megabytes_per_second": rate}
        how = ["--dtype", given.dtype, "--bits", given.bits, "--block", given.block]
    options = ["-o", str(target), "--overwrite", "--json"]
    printed, seconds, usage = run("quantize", str(source), *how, *options)
    result = {
        "source_megabytes": megabytes,
        **beside,
        "bits_per_weight": printed["bits_per_weight"],
        "output_megabytes": printed["bytes"] / 1e6,
        "quantize_megabytes_per_second": megabytes / seconds,
        "seconds": seconds,
        "peak_resident_megabytes": usage.ru_maxrss / 1024 * 1.048576,
        "processors_used": (usage.ru_utime + usage.ru_stime) / seconds,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    shutil.rmtree(target)
    text = json.dumps(result, indent=1)
    print(text)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
