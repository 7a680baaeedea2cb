"""What quantization adds to perplexity: fracbit's preset `best` beside GPTQModel, llm-compressor, AutoRound and HQQ.

    python bench/quality.py --work FOLDER [--models tales-s bundled] [--widths 2 3 4] [--peers hqq] [--environments FOLDER]

Every tool quantizes the linears of the blocks of each model at about k + 1/4 stored bits per weight, calibrated on the same 256
samples of 256 ids; every peer runs in an environment of its own, installed when it is missing. What comes out is dequantized,
put into the plain Hugging Face model and judged by one evaluator on text that nobody calibrated on: the first 256 ids of each
document, and the 256 that follow as documents of their own, since settings were once chosen on the first ones. Bits are counted
from stored bytes, for all linears, those that a tool skips at 16 bits each. A peer is compared where it stores no fewer bits
than fracbit and at most `SLACK` more than asked for. What FOLDER holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peers.environments import PEERS, command, surroundings
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.data import read_calibration
from fracbit.data.read import read_documents
from fracbit.evaluation import perplexity
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import decode

SHARED = Path(os.environ.get("FRACBIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODELS = ("tales-xs", "tales-s", "tales-m", "tales-l", "bundled")
SAMPLES, LENGTH = 256, 256  # the tales models saw no longer texts
DOCUMENTS = 128  # to judge by
SLACK = 0.3
TARGET = 0.8


@dataclass(frozen=True)
class Row:
    """One quantized model: stored bits per weight, perplexity on both sets of documents, seconds and peak bytes of its run."""

    model: str
    tool: str
    label: str
    asked: float
    bits: float
    first: float
    second: float
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()


def folder_of(model: str) -> Path:
    return Path(bundled_model()) if model == "bundled" else SHARED / "models" / model


@dataclass(frozen=True, eq=False)
class Texts:
    """The file of calibration samples [SAMPLES, LENGTH]; two sets of documents [DOCUMENTS, LENGTH] to judge by."""

    calibration: Path
    first: Tensor
    second: Tensor


def texts(model: str, work: Path) -> Texts:
    """Calibration and evaluation ids of a model, the former written below `work`."""
    folder = folder_of(model)
    tokenizer = load_tokenizer(str(folder))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    bundled = model == "bundled"
    read, kept = "bundled:train", "bundled:held-out"
    if not bundled:
        read, kept = (
            f"{SHARED}/data/tales-{part}.u16?length={2 * LENGTH}" for part in ("calibration", "evaluation")
        )
        read += f"&keep={LENGTH}"
    path = work / ("bundled.npy" if bundled else "tales.npy")
    if not path.exists():
        drawn = read_calibration([read], tokenizer, vocabulary, samples=SAMPLES, length=LENGTH, seed=0)
        np.save(path, drawn.ids.numpy())
    stream = read_documents(kept, tokenizer, vocabulary).stream
    documents = stream[: DOCUMENTS * 2 * LENGTH].view(DOCUMENTS, 2 * LENGTH)
    return Texts(path, documents[:, :LENGTH], documents[:, LENGTH:])


def judge(model: PreTrainedModel, given: Texts) -> tuple[float, float]:
    """Perplexity on both sets of documents; the second, which begin in the middle of a text, get a BOS."""
    bos = model.config.bos_token_id
    first = perplexity(model, list(given.first), window=LENGTH)
    second = perplexity(model, list(given.second), window=LENGTH + 1, bos=bos)
    return first.perplexity, second.perplexity


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def peer_settings(peer: str, width: int, folder: Path) -> list[dict]:
    """What a peer is tried with at `width` + 1/4 bits: groups near 64, of llm-compressor those that divide the layers.

    GPTQModel and AutoRound store zero points also where they are symmetric, so they are tried with real ones alone.
    """
    config = json.loads((folder / "config.json").read_text())
    wide, inner = config["hidden_size"], config["intermediate_size"]
    group, down = divisor(wide, 64), divisor(inner, 64)
    if peer == "hqq":
        tries = [{"group": g, "axis": axis} for g in (64, 128) for axis in (0, 1)]
    elif peer == "llmcompressor":
        base = {"group": group, "group_down": down}
        tries = [{**base, "sym": True}, {**base, "sym": False}, {**base, "sym": False, "observer": "mse"}]
    elif peer == "gptqmodel":
        tries = [{"group": 64, "sym": False}, {"group": 64, "sym": False, "mse": 2.4}]
    else:
        tries = [{"group": 64, "sym": False, "iters": 200}]
    named = [{"bits": width, **one} for one in tries]
    return [{"label": "-".join(f"{k}{v}" for k, v in one.items()).replace("_", ""), **one} for one in named]


def divisor(width: int, near: int) -> int:
    """The divisor of `width` nearest to `near`, of those that are at least 16."""
    return min((d for d in range(16, width + 1) if width % d == 0), key=lambda d: abs(d - near))


def run_peer(peer: str, model: str, widths: list[int], work: Path, ids: Path, environments: Path) -> None:
    """Everything a peer is tried with on one model, in one process."""
    out = work / model / peer
    settings = [one for width in widths for one in peer_settings(peer, width, folder_of(model))]
    settings = [one for one in settings if not (out / one["label"] / "facts.json").exists()]
    if settings:
        order = command(peer, environments, folder_of(model), ids, out, settings)
        with (out / "log.txt").open("a") as log:
            subprocess.run(
                order, cwd=out, env=surroundings(), stdout=log, stderr=log, check=False
            )  # some litter


def run_fracbit(model: str, width: int, work: Path, ids: Path) -> Path:
    out = work / model / "fracbit" / f"{width + 0.25}"
    if not (out / "facts.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        order = [
            sys.executable,
            "-m",
            "fracbit",
            "quantize",
            str(folder_of(model)),
            "-o",
            str(out / "checkpoint"),
        ]
        order += [
            "--preset",
            "best",
            "--average-bits",
            f"{width + 0.25}",
            "--calibration",
            str(ids),
            "--json",
        ]
        order += ["--samples", str(SAMPLES), "--length", str(LENGTH), "--overwrite"]
        found = subprocess.run(order, stdout=subprocess.PIPE, check=True)
        (out / "facts.json").write_bytes(found.stdout)
    return out


def fracbit_row(model: str, width: int, out: Path, given: Texts) -> Row:
    """The checkpoint of fracbit, decoded into the plain model, norms included."""
    facts = json.loads((out / "facts.json").read_text())
    plain, stored = load(str(folder_of(model)), torch.float32), load(str(out / "checkpoint"), torch.float32)
    packed = {n: m.packed for n, m in stored.named_modules() if isinstance(m, QuantLinear)}
    rest = {n: p for n, p in stored.named_parameters() if n.rpartition(".")[0] not in packed}
    with torch.no_grad():
        for name, layer in linears(plain).items():
            layer.weight.copy_(decode(packed[name]))
        for name, parameter in plain.named_parameters():
            if name in rest:
                parameter.copy_(rest[name])
    first, second = judge(plain, given)
    bits = facts["bits_per_weight"]
    peak = facts["peak_rss_bytes"]
    return Row(
        model,
        "fracbit",
        "best",
        width + 0.25,
        bits,
        first,
        second,
        facts["seconds"],
        peak,
        tuple(facts["notes"]),
    )


def peer_rows(model: str, peer: str, work: Path, widths: list[int], given: Texts) -> Iterator[Row]:
    plain = load(str(folder_of(model)), torch.float32)
    layers = linears(plain)
    floats = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    total = sum(weight.numel() for weight in floats.values())
    for path in sorted((work / model / peer).glob("*/facts.json")):
        facts = json.loads(path.read_text())
        setting = facts["setting"]
        if setting["bits"] not in widths:
            continue
        asked = setting["bits"] + 0.25
        if "error" in facts:
            notes = (facts["error"],)
            yield Row(model, peer, setting["label"], asked, math.nan, math.nan, math.nan, 0, 0, notes)
            continue
        made = load_file(path.parent / "weights.safetensors")
        skipped = [name for name in layers if name not in made]
        stored = sum(facts["bytes"].values()) + sum(2 * floats[name].numel() for name in skipped)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(made.get(name, floats[name]))
        first, second = judge(plain, given)
        notes = (f"{len(skipped)} of {len(layers)} linears left in 16 bits",) if skipped else ()
        bits = 8 * stored / total
        peak = facts["peak_rss_bytes"]
        yield Row(model, peer, setting["label"], asked, bits, first, second, facts["seconds"], peak, notes)


def compared(rows: list[Row], floats: dict[str, tuple[float, float]]) -> list[dict]:
    """For each model and width: fracbit, the best peer at no fewer bits, and the ratio of what they add."""
    found = []
    for own in (row for row in rows if row.tool == "fracbit"):
        plain = floats[own.model]
        peers = [
            row
            for row in rows
            if row.tool != "fracbit" and row.model == own.model and row.asked == own.asked
            and own.bits - 1e-3 <= row.bits <= own.asked + SLACK
        ]  # fmt: skip
        line: dict = {"model": own.model, "asked": own.asked, "bits": own.bits}
        for half, place in (("first", 0), ("second", 1)):
            added = getattr(own, half) - plain[place]
            line[f"{half}_added"] = added
            if peers:
                best = min(peers, key=lambda row: getattr(row, half))
                gap = getattr(best, half) - plain[place]
                line |= {f"{half}_peer": f"{best.tool} {best.label}", f"{half}_peer_bits": best.bits}
                line |= {f"{half}_peer_added": gap, f"{half}_ratio": added / gap if gap > 0 else math.inf}
        found.append(line)
    return found


def show(rows: list[Row], floats: dict[str, tuple[float, float]], lines: list[dict]) -> None:
    print("| model | tool | setting | bits | first texts | second texts | seconds | peak MB | notes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(
        rows, key=lambda r: (MODELS.index(r.model), r.asked, r.tool != "fracbit", r.tool, r.bits)
    ):
        cells = [row.model, row.tool, row.label, f"{row.bits:.3f}", f"{row.first:.3f}", f"{row.second:.3f}"]
        cells += [f"{row.seconds:.0f}", f"{row.peak_rss_bytes / 1e6:.0f}", "; ".join(row.notes)]
        print("| " + " | ".join(cells) + " |")
    print("\n| model | float | asked | fracbit adds | best peer adds | ratio | second texts: ratio | peer |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        if "first_ratio" not in line:
            print(
                f"| {line['model']} | | {line['asked']} | {line['first_added']:.3f} | no peer at these bits | | | |"
            )
            continue
        print(
            f"| {line['model']} | {floats[line['model']][0]:.3f} | {line['asked']} | {line['first_added']:.3f} "
            f"| {line['first_peer_added']:.3f} | {line['first_ratio']:.2f} | {line['second_ratio']:.2f} "
            f"| {line['first_peer']} ({line['first_peer_bits']:.3f} bits) |"
        )
    misses = [line for line in lines if max(line.get("first_ratio", 0), line.get("second_ratio", 0)) > TARGET]
    print(f"\n{len(lines) - len(misses)} of {len(lines)} at most {TARGET} of the best peer on both texts")


def main() -> None:
    """Run what is missing, evaluate, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--environments", type=Path, default=None, help="default: WORK/environments")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--only", choices=("run", "table"), help="run the tools, or evaluate what they left")
    parser.add_argument("--json", type=Path, default=Path("bench/results/quality.json"))
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    environments = (given.environments or given.work / "environments").resolve()
    rows: list[Row] = []
    floats: dict[str, tuple[float, float]] = {}
    for model in given.models:
        text = texts(model, given.work)
        if given.only != "table":
            for peer in given.peers:
                run_peer(peer, model, given.widths, given.work, text.calibration, environments)
            for width in given.widths:
                run_fracbit(model, width, given.work, text.calibration)
        if given.only == "run":
            continue
        floats[model] = judge(load(str(folder_of(model)), torch.float32), text)
        for peer in given.peers:
            rows += peer_rows(model, peer, given.work, given.widths, text)
        for width in given.widths:
            out = given.work / model / "fracbit" / f"{width + 0.25}"
            if (out / "facts.json").exists():
                rows.append(fracbit_row(model, width, out, text))
    if given.only == "run":
        return
    lines = compared(rows, floats)
    show(rows, floats, lines)
    protocol = (
        f"{SAMPLES} x {LENGTH} calibration ids; judged on two sets of {DOCUMENTS} documents of {LENGTH} ids"
    )
    result = {"protocol": protocol, "float": floats, "rows": [asdict(row) for row in rows], "compared": lines}
    result["bench_peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
