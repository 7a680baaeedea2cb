"""Decode steps of whole models, batch 1: fracbit beside other libraries, on a 160M- and a 1B-shaped Llama of random weights.
Makes the table of decode steps in docs/serving.md (bench/results/decode.json).

    python bench/kernels/decode.py [--shapes 160m] [--peers transformers gptqmodel llama-cpp-python] [--json out.json]

Every number is the median step after a prompt, then the median of rounds in which everything runs in turn. The share is that
of a plain read of the bytes that a step reads. Peers keep the output head in float, llama.cpp rounds it to 6 bits: fracbit is
shown both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ENVIRONMENTS, Row, arguments, medians, say_machine, write_json
from peers.environments import rows_of
from peers.packs import PACKS
from peers.shapes import PROMPT, SHAPES, VOCABULARY
from peers.time_decode import float_model

from fracbit.kernels.cpu import NATIVE
from fracbit.models.quant_linear import QuantLinear
from fracbit.models.step import Decoder
from fracbit.models.store_cache import StoreCache
from fracbit.pipeline.serve.speed import bytes_read
from fracbit.records.scheme import Scheme

PEERS = ("transformers", "gptqmodel", "llama-cpp-python", *PACKS)
LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
OWN = (("int", 4, 16), ("int", 4, 6), ("nf", 4, 6), ("kmeans", 4, 6), ("int", 3, 6), ("int", 2, 6))
"""Data type and bits of the blocks, and bits of the output head."""


def random_layer(rows: int, columns: int, dtype: str, bits: int) -> QuantLinear:
    """A packed layer of random codes: what a step costs does not depend on them."""
    layer = QuantLinear(Scheme(dtype, bits, 64), (rows, columns))
    for name, part in layer.named_buffers():
        if part.dtype == torch.uint8:
            part.random_()
        else:
            part.copy_(torch.linspace(-1, 1, part.shape[-1]) if "table" in name else torch.tensor(0.003))
    layer.choose("int8")
    return layer


def packed_model(shape: str, dtype: str, bits: int, head: int) -> Any:
    model = float_model(shape)
    for block in model.model.layers:
        for name in LAYERS:
            block.set_submodule(name, random_layer(*block.get_submodule(name).weight.shape, dtype, bits))
    if head < 16:
        model.lm_head = random_layer(VOCABULARY, model.config.hidden_size, "int", head)
    return model


def timed(seconds: list[float], call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    found = call()
    seconds.append(time.perf_counter() - started)
    return found


@torch.inference_mode()
def own(shape: str, dtype: str, bits: int, head: int, tokens: int) -> Row:
    """Steps per second natively and layer by layer, and the share of a plain read."""
    model, threads = packed_model(shape, dtype, bits, head), torch.get_num_threads()
    size, pads = bytes_read(model), torch.zeros(1, dtype=torch.long)
    raw = torch.zeros(size, dtype=torch.uint8)
    cache, made, steps, reads, layers = StoreCache(model.config, 256), [], [], [], []
    token = model(torch.arange(PROMPT)[None], past_key_values=cache).logits[:, -1].argmax(-1)
    decoder = timed(made, lambda: Decoder(model))
    for number in range(tokens):
        token = timed(steps, lambda last=token: decoder.advance(last, pads, cache).argmax(-1))
        if number % 4 == 0:
            timed(reads, lambda: NATIVE.read(raw, threads))
    for _ in range(max(tokens // 4, 3)):
        timed(layers, lambda: model(token[:, None], past_key_values=cache))
    step, read, layered = (statistics.median(seconds[1:]) for seconds in (steps, reads, layers))
    return {
        "name": f"fracbit {dtype}{bits}/64, head {'bf16' if head == 16 else f'int{head}'}", "tokens_per_second": 1 / step,
        "layer_by_layer": 1 / layered, "bytes": size, "read_GBps": size / read / 1e9, "share": read / step,
        "made_in_ms": made[0] * 1e3,
    }  # fmt: skip


def one_round(shape: str, given: argparse.Namespace) -> list[Row]:
    """Everything once, in turns: the speed of a shared machine drifts by more than what is compared."""
    rows = [own(shape, dtype, bits, head, given.tokens) for dtype, bits, head in OWN]
    for name in given.peers:
        script = "time_llama_cpp.py" if name == "llama-cpp-python" else "time_decode.py"
        words = (name, shape, given.tokens, given.threads)
        rows += rows_of(name, script, words, given.environments, given.threads)
    return rows


def show(row: Row, first: float) -> None:
    speed, spread = row["tokens_per_second"], f"({row['least']:.0f} to {row['most']:.0f})"
    more = "  share of a read {share:.2f}; layer by layer {layer_by_layer:.1f}" if "share" in row else ""
    print(f"  {row['name']:<44} {speed:7.1f} {spread:<14} tokens/s  {first / speed:5.2f}{more.format(**row)}")


def main() -> None:
    parser = arguments(
        __doc__, {"peers": PEERS}, rounds=3, threads=os.cpu_count(), peers=["transformers"], environments=ENVIRONMENTS,
        json=None,
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    say_machine()
    known = given.json and given.json.exists()
    shapes = json.loads(given.json.read_text())["shapes"] if known else {}  # of another run, kept
    for shape in given.shapes:
        rounds = [one_round(shape, given) for _ in range(given.rounds)]
        rows = medians((row for rows in rounds for row in rows), ("name",), "tokens_per_second")
        print(f"{shape}: tokens per second, and how many times as fast the first line is; medians of rounds")
        for row in rows:
            show(row, rows[0]["tokens_per_second"])
        shapes[shape] = {"rounds": rounds, "medians": rows}
        write_json(given.json, {"shapes": shapes})


if __name__ == "__main__":
    main()
