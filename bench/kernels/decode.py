"""Decode steps of whole models, batch 1: fracbit beside other libraries, on a 160M- and a 1B-shaped Llama of random weights.

    python bench/kernels/decode.py                                   fracbit and transformers' bf16
    python bench/kernels/decode.py --peers gptqmodel llama-cpp-python  each installed into an environment of its own

Every number is the median step after a prompt, then the median of rounds in which everything runs in turn.
The share is that of a plain read of the
bytes that a step reads. Peers keep the output head in float, llama.cpp rounds it to 6 bits: fracbit is shown both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shapes import PROMPT, SHAPES, VOCABULARY

PEERS = {
    "transformers": ["transformers"], "torchao": ["torchao"], "bitsandbytes": ["bitsandbytes"],
    "optimum-quanto": ["optimum-quanto"], "gptqmodel": ["gptqmodel"], "llama-cpp-python": ["llama-cpp-python", "gguf"],
}  # fmt: skip
OWN = (("int", 4, 16), ("int", 4, 6), ("nf", 4, 6), ("kmeans", 4, 6), ("int", 3, 6), ("int", 2, 6))


def random_layer(rows: int, columns: int, dtype: str, bits: int) -> Any:
    """A packed layer of random codes: what a step costs does not depend on them."""
    import torch

    from fracbit.models.quant_linear import QuantLinear
    from fracbit.records.scheme import Scheme

    layer = QuantLinear(Scheme(dtype, bits, 64), (rows, columns))
    for name, part in layer.named_buffers():
        if part.dtype == torch.uint8:
            part.random_()
        else:
            part.copy_(torch.linspace(-1, 1, part.shape[-1]) if "table" in name else torch.tensor(0.003))
    layer.choose("int8")
    return layer


def packed_model(shape: str, dtype: str, bits: int, head: int) -> Any:
    from decode_peers import float_model

    from fracbit.models.step import LAYERS

    model = float_model(shape)
    for block in model.model.layers:
        for name in LAYERS:
            rows, columns = block.get_submodule(name).weight.shape
            block.set_submodule(name, random_layer(rows, columns, dtype, bits))
    if head < 16:
        model.lm_head = random_layer(VOCABULARY, model.config.hidden_size, "int", head)
    return model


def own(shape: str, dtype: str, bits: int, head: int, tokens: int) -> dict[str, Any]:
    """Steps per second natively and layer by layer, and the share of a plain read."""
    import torch

    from fracbit.kernels.cpu import NATIVE
    from fracbit.models.step import Decoder
    from fracbit.models.store_cache import StoreCache
    from fracbit.pipeline.serve.speed import bytes_read

    model, threads = packed_model(shape, dtype, bits, head), torch.get_num_threads()
    size, pads, steps, reads, layers = bytes_read(model), torch.zeros(1, dtype=torch.long), [], [], []
    raw = torch.zeros(size, dtype=torch.uint8)
    with torch.inference_mode():
        cache = StoreCache(model.config, 256)
        token = model(torch.arange(PROMPT)[None], past_key_values=cache).logits[:, -1].argmax(-1)
        started = time.perf_counter()
        decoder = Decoder(model)
        built = time.perf_counter() - started
        for number in range(tokens):
            started = time.perf_counter()
            token = decoder.advance(token, pads, cache).argmax(-1)
            steps.append(time.perf_counter() - started)
            if number % 4 == 0:
                started = time.perf_counter()
                NATIVE.read(raw, threads)
                reads.append(time.perf_counter() - started)
        for _ in range(max(tokens // 4, 3)):
            started = time.perf_counter()
            model(token[:, None], past_key_values=cache)
            layers.append(time.perf_counter() - started)
    step, read = statistics.median(steps[1:]), statistics.median(reads[1:])
    return {
        "name": f"fracbit {dtype}{bits}/64, head {'bf16' if head == 16 else f'int{head}'}", "tokens_per_second": 1 / step,
        "layer_by_layer": 1 / statistics.median(layers[1:]), "bytes": size, "read_GBps": size / read / 1e9,
        "share": read / step, "made_in_ms": built * 1e3,
    }  # fmt: skip


def peer(name: str, shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Install a peer into its own environment and run decode_peers.py there; transformers runs in ours."""
    python = Path(sys.executable)
    if name != "transformers":
        folder = arguments.environments / name
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            wanted = (
                PEERS[name]
                if "llama" in name
                else [*PEERS[name], f"torch=={version('torch').split('+')[0]}", "transformers"]
            )
            done = subprocess.run(
                [python, "-m", "pip", "install", "-q", "numpy", *wanted],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(f"{name}: does not install here: {done.stderr.strip().splitlines()[-1:]}")
                return []
    command = [
        python,
        Path(__file__).with_name("decode_peers.py"),
        name,
        shape,
        str(arguments.tokens),
        str(arguments.threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: did not run: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return []
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return [{"name": label, "tokens_per_second": speed} for label, speed in found.items()]


def show(row: dict[str, Any], first: float) -> None:
    speed, more = row["tokens_per_second"], ""
    if "share" in row:
        more = f"  share of a plain read {row['share']:.2f}; layer by layer {row['layer_by_layer']:.1f}"
    spread = f"({row['least']:.0f} to {row['most']:.0f})"
    print(f"  {row['name']:<44} {speed:7.1f} {spread:<14} tokens/s  {first / speed:5.2f}{more}", flush=True)


def main() -> None:
    """Parse, measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", nargs="*", default=["transformers"], choices=list(PEERS))
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "fracbit" / "bench")
    parser.add_argument("--json", type=Path, help="written to, shapes of another run are kept")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "shapes": {},
    }
    if arguments.json and arguments.json.exists():
        result["shapes"] = json.loads(arguments.json.read_text())["shapes"]
    for shape in arguments.shapes:
        rounds = [one_round(shape, arguments) for _ in range(arguments.rounds)]
        rows = medians(rounds)
        print(f"{shape}: tokens per second, and how many times as fast the first line is; medians of rounds")
        for row in rows:
            show(row, rows[0]["tokens_per_second"])
        result["shapes"][shape] = {"rounds": rounds, "medians": rows}
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def one_round(shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything once, in turns: the speed of a shared machine drifts by more than what is compared."""
    rows = [own(shape, dtype, bits, head, arguments.tokens) for dtype, bits, head in OWN]
    return rows + [row for name in arguments.peers for row in peer(name, shape, arguments)]


def medians(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The median of every figure over the rounds, row by row; least and most tokens a second beside it."""
    names = list(dict.fromkeys(row["name"] for rows in rounds for row in rows))
    found = []
    for name in names:
        same = [row for rows in rounds for row in rows if row["name"] == name]
        speeds = [row["tokens_per_second"] for row in same]
        middle = {key: statistics.median(row[key] for row in same) for key in same[0] if key != "name"}
        found.append({"name": name, **middle, "least": min(speeds), "most": max(speeds)})
    return found


if __name__ == "__main__":
    main()
