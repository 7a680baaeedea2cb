"""How long GPTQ takes, and in how much memory: fracbit beside GPTQModel and llm-compressor, each in a process of its own.

    python bench/gptq_speed.py --work FOLDER [--environments FOLDER] [--rounds 2] [--blocks 14]

A Llama of 160M shape (hidden 1024, 14 blocks, intermediate 2816, bf16, random weights) is quantized to 4 bits in groups of 128
with 32 x 512 calibration ids, by every tool in turn, `--rounds` times. Seconds are wall clock of the whole process: imports,
reading, quantizing, writing a checkpoint. Memory is the peak resident size as the kernel accounts it. Peers run with their
defaults and a batch of 8 samples, as fracbit. All get the same number of threads: one per core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peers.environments import command, environment, surroundings
from transformers import LlamaConfig, LlamaForCausalLM

PEERS = ("gptqmodel", "llmcompressor")
SETTING = {"label": "b4g128", "bits": 4, "group": 128, "batch": 8, "keep": True}
SAMPLES, LENGTH, VOCABULARY = 32, 512, 4096
TARGET = 2.0


def make_model(folder: Path, blocks: int) -> None:
    """Write the model and its calibration ids; nothing is done when they are there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=blocks, intermediate_size=2816, num_attention_heads=16,
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (SAMPLES, LENGTH))
    np.save(folder / "ids.npy", ids.astype(np.int64))


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of one word per id: peers want one, nobody uses it here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained(folder)


def order_of(tool: str, model: Path, work: Path, environments: Path) -> list[str]:
    if tool != "fracbit":
        return command(tool, environments, model, model / "ids.npy", work / tool, [SETTING])
    order = [
        sys.executable,
        "-m",
        "fracbit",
        "quantize",
        str(model),
        "-o",
        str(work / tool / "checkpoint"),
        "--json",
    ]
    order += ["--quantizer", "gptq", "--bits", "4", "--block", "128", "--calibration", str(model / "ids.npy")]
    return [*order, "--samples", str(SAMPLES), "--length", str(LENGTH)]


def measure(order: list[str], log: Path) -> dict[str, float]:
    """Run a command; wall seconds, CPU seconds of all its threads, and peak resident bytes."""
    started = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(order, stdout=file, stderr=file, env=surroundings(os.cpu_count()))
        _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{order[0]} failed; see {log}")
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": used.ru_maxrss * 1024}


def main() -> None:
    """Measure in turns, print ratios, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--environments", type=Path, default=None, help="default: WORK/environments")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--json", type=Path, default=Path("bench/results/gptq_speed.json"))
    given = parser.parse_args()
    environments = given.environments or given.work / "environments"
    for peer in PEERS:
        environment(peer, environments)
    model = given.work / f"llama-{given.blocks}"
    model.parent.mkdir(parents=True, exist_ok=True)
    make_model(model, given.blocks)
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in ("fracbit", *PEERS)}
    for number in range(given.rounds):
        for tool in runs:
            shutil.rmtree(given.work / tool, ignore_errors=True)
            order = order_of(tool, model, given.work, environments)
            runs[tool].append(measure(order, given.work / f"{tool}.log"))
            one = runs[tool][-1]
            print(
                f"round {number + 1} {tool:14} {one['seconds']:7.1f} s {one['peak_rss_bytes'] / 1e9:5.2f} GB",
                flush=True,
            )
    median = {
        tool: {key: statistics.median(run[key] for run in all_runs) for key in all_runs[0]}
        for tool, all_runs in runs.items()
    }
    own = median["fracbit"]
    ratios = {peer: {key: median[peer][key] / own[key] for key in own} for peer in PEERS}
    for peer, ratio in ratios.items():
        print(
            f"{peer}: {ratio['seconds']:.2f} times the wall clock, {ratio['cpu_seconds']:.2f} the CPU time, "
            f"{ratio['peak_rss_bytes']:.2f} the memory of fracbit"
        )
    least = min(ratio["seconds"] for ratio in ratios.values())
    print(f"faster than the faster peer by {least:.2f}; target {TARGET}")
    result = {
        "protocol": f"{given.blocks} blocks, {SAMPLES} x {LENGTH} ids, 4 bits, group 128, {os.cpu_count()} threads",
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "runs": runs, "median": median, "ratios": ratios,
    }  # fmt: skip
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
