"""How long GPTQ takes, and in how much memory: fracbit beside GPTQModel and llm-compressor, each in a process of its own.
Makes the table of GPTQ's time and memory in docs/quality.md (bench/results/gptq_speed.json).

    python bench/gptq_speed.py --work FOLDER [--environments FOLDER] [--rounds 2] [--blocks 14]

A Llama of 160M shape (hidden 1024, 14 blocks, intermediate 2816, bf16, random weights) is quantized to 4 bits in groups of 128
with 32 x 512 calibration ids, by every tool in turn, `--rounds` times. Seconds are wall clock of the whole process: imports,
reading, quantizing, writing a checkpoint. Memory is the peak resident size as the kernel accounts it. Peers run with their
defaults and a batch of 8 samples, as fracbit. All get the same number of threads: one per core.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from frame import ENVIRONMENTS, RESULTS, Ran, Row, arguments, fracbit, medians, say_machine, write_json
from peers.environments import environment, quantize_with
from peers.shapes import SHAPES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PEERS = ("gptqmodel", "llmcompressor")
SETTING = {"label": "b4g128", "bits": 4, "group": 128, "batch": 8, "keep": True}
SAMPLES, LENGTH, VOCABULARY = 32, 512, 4096
TARGET = 2.0


def make_model(folder: Path, blocks: int) -> None:
    """Write the model, its calibration ids and a tokenizer of one word per id, which only peers ask for; once."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    sizes = SHAPES["160m"] | {
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained(folder)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (SAMPLES, LENGTH))
    np.save(folder / "ids.npy", ids.astype(np.int64))


def quantize(tool: str, model: Path, work: Path, environments: Path) -> Ran:
    """One process of one tool, from an empty folder to its checkpoint."""
    out, log, threads = work / tool, work / f"{tool}.log", os.cpu_count()
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    if tool == "fracbit":
        how = ("--quantizer", "gptq", "--scheme", "int4/128", "--calibration", model / "ids.npy")
        sizes = ("--set", f"calibration.samples={SAMPLES}", "--set", f"calibration.length={LENGTH}")
        where = ("-o", out / "checkpoint", *sizes)
        return fracbit("quantize", model, *how, *where, log=log, threads=threads)[1]
    ran = quantize_with(tool, model, model / "ids.npy", out, [SETTING], environments, log, threads)
    if ran.status:
        raise SystemExit(f"{tool} failed; see {log}")
    return ran


def summary(runs: dict[str, list[Row]], blocks: int) -> dict:
    """Medians over the rounds so far, and each peer's over fracbit's."""
    median = {tool: medians(rounds, ())[0] for tool, rounds in runs.items()}
    own = median["fracbit"]
    ratios = {peer: {key: median[peer][key] / value for key, value in own.items()} for peer in PEERS}
    protocol = f"{blocks} blocks, {SAMPLES} x {LENGTH} ids, 4 bits, group 128, {os.cpu_count()} threads"
    return {"protocol": protocol, "runs": runs, "median": median, "ratios": ratios}


def main() -> None:
    where = {"work": None, "environments": ENVIRONMENTS, "json": RESULTS / "gptq_speed.json"}
    parser = arguments(__doc__, rounds=2, **where)
    parser.add_argument("--blocks", type=int, default=14)
    given = parser.parse_args()
    work = given.work.resolve()
    environments, model = given.environments.resolve(), work / f"llama-{given.blocks}"
    for peer in PEERS:
        environment(peer, environments)
    make_model(model, given.blocks)
    say_machine()
    runs: dict[str, list[Row]] = {tool: [] for tool in ("fracbit", *PEERS)}
    for number in range(given.rounds):
        for tool, done in runs.items():
            ran = quantize(tool, model, work, environments)
            done.append({name: getattr(ran, name) for name in ("seconds", "cpu_seconds", "peak_rss_bytes")})
            print(f"round {number + 1} {tool:14} {ran.seconds:7.1f} s {ran.peak_rss_bytes / 1e9:5.2f} GB")
        write_json(given.json, summary(runs, given.blocks))
    for peer, ratio in summary(runs, given.blocks)["ratios"].items():
        print(f"{peer}: {ratio['seconds']:.2f} times the time, {ratio['peak_rss_bytes']:.2f} the memory")
    print(f"target: {TARGET} times the time, more memory")


if __name__ == "__main__":
    main()
