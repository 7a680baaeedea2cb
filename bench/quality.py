"""What quantization adds to perplexity: fracbit's preset `best` beside GPTQModel, llm-compressor, AutoRound and HQQ.
Makes both tables of quality in docs/quality.md (bench/results/quality.json).

    python bench/quality.py --work FOLDER [--models tales-s bundled] [--widths 2 3 4] [--peers hqq] [--environments FOLDER]

Every tool quantizes the linears of the blocks of each model at about k + 1/4 stored bits per weight, calibrated on the same 256
samples of 256 ids; every peer runs in an environment of its own, installed when it is missing. What comes out is dequantized,
put into the plain Hugging Face model and judged by one evaluator on text that nobody calibrated on: the first 256 ids of each
document, and the 256 that follow as documents of their own, since settings were once chosen on the first ones. Bits are counted
from stored bytes, for all linears, those that a tool skips at 16 bits each. A peer is compared where it stores no fewer bits
than fracbit and at most `SLACK` more than asked for. What FOLDER holds already is not made again.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from frame import ENVIRONMENTS, RESULTS, Bed, Row, arguments, bed, fracbit, say_machine, table, write_json
from peers.environments import quantize_with
from peers.quantize import PEERS, linears
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.data import read_calibration, read_documents
from fracbit.evaluation import perplexity
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import decode

MODELS = ("tales-xs", "tales-s", "tales-m", "tales-l", "bundled")
SAMPLES, LENGTH = 256, 256  # the tales models saw no longer texts
DOCUMENTS = 128  # to judge by
SLACK = 0.3
TARGET = 0.8
HALVES = ("first", "second")
COMPARED = {"first_peer_added": ".3f", "first_ratio": ".2f", "second_ratio": ".2f"}


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A model, the file of its calibration ids [SAMPLES, LENGTH], and two sets of documents [DOCUMENTS, LENGTH] to judge by."""

    bed: Bed
    ids: Path
    first: Tensor
    second: Tensor

    def load(self) -> PreTrainedModel:
        return load(self.bed.folder, torch.float32)

    def judge(self, model: PreTrainedModel) -> tuple[float, float]:
        """Perplexity on both sets; the documents of the second begin in the middle of a text and get a BOS."""
        first = perplexity(model, list(self.first), window=LENGTH)
        second = perplexity(model, list(self.second), window=LENGTH + 1, bos=model.config.bos_token_id)
        return first.perplexity, second.perplexity

    def row(self, tool: str, label: str, asked: float, **figures: object) -> Row:
        return {"model": self.bed.name, "tool": tool, "label": label, "asked": asked, **figures}


def find_float_model(model: str, work: Path) -> FloatModel:
    """A model with its texts; the calibration ids are written below `work`."""
    where, whole = bed(model, LENGTH), bed(model, 2 * LENGTH)
    tokenizer = load_tokenizer(where.folder)
    path = work / ("bundled.npy" if model == "bundled" else "tales.npy")
    if not path.exists():
        sources, how = [where.calibration], {"samples": SAMPLES, "length": LENGTH, "seed": 0}
        np.save(path, read_calibration(sources, tokenizer, where.vocabulary, **how).ids.numpy())
    stream = read_documents(whole.evaluation, tokenizer, where.vocabulary).stream
    documents = stream[: DOCUMENTS * 2 * LENGTH].view(DOCUMENTS, 2 * LENGTH)
    return FloatModel(where, path, documents[:, :LENGTH], documents[:, LENGTH:])


def peer_settings(peer: str, width: int, folder: Path) -> list[Row]:
    """What a peer is tried with at `width` + 1/4 bits: groups near 64, of llm-compressor those that divide the layers.

    GPTQModel and AutoRound store zero points also where they are symmetric, so they are tried with real ones alone.
    """
    config = json.loads((folder / "config.json").read_text())
    group, down = (divisor(config[size], 64) for size in ("hidden_size", "intermediate_size"))
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


def run_peer(peer: str, float_model: FloatModel, widths: list[int], out: Path, environments: Path) -> None:
    """Everything a peer is tried with on one model, in one process; one that ends early leaves what it has done."""
    settings = [one for width in widths for one in peer_settings(peer, width, float_model.bed.folder)]
    settings = [one for one in settings if not (out / one["label"] / "facts.json").exists()]
    if settings:
        quantize_with(
            peer, float_model.bed.folder, float_model.ids, out, settings, environments, out / "log.txt"
        )


def run_fracbit(float_model: FloatModel, asked: float, out: Path) -> None:
    if not (out / "facts.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        how = ("--preset", "best", "--average-bits", asked, "--calibration", float_model.ids)
        sizes = ("--set", f"calibration.samples={SAMPLES}", "--set", f"calibration.length={LENGTH}")
        where = ("-o", out / "checkpoint", *sizes, "--overwrite")
        facts, _ = fracbit("quantize", float_model.bed.folder, *how, *where)
        (out / "facts.json").write_text(json.dumps(facts))


def fracbit_row(float_model: FloatModel, asked: float, out: Path) -> Row:
    """The checkpoint of fracbit, decoded into the plain model, norms included."""
    facts = json.loads((out / "facts.json").read_text())
    plain, stored = float_model.load(), load(out / "checkpoint", torch.float32)
    packed = {n: m.packed for n, m in stored.named_modules() if isinstance(m, QuantLinear)}
    rest = {n: p for n, p in stored.named_parameters() if n.rpartition(".")[0] not in packed}
    decoded = {f"{name}.weight": decode(packed[name]) for name in linears(plain)}
    plain.load_state_dict(decoded | rest, strict=False)
    figures = dict(zip(HALVES, float_model.judge(plain), strict=True))
    same = {name: facts[name] for name in ("seconds", "peak_rss_bytes", "notes")}
    return float_model.row("fracbit", "best", asked, bits=facts["bits_per_weight"], **figures, **same)


def peer_rows(peer: str, float_model: FloatModel, widths: list[int], out: Path) -> Iterator[Row]:
    plain = float_model.load()
    layers = linears(plain)
    floats = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for path in sorted(out.glob("*/facts.json")):
        facts = json.loads(path.read_text())
        setting = facts["setting"]
        if setting["bits"] not in widths:
            continue
        named = (peer, setting["label"], setting["bits"] + 0.25)
        if "error" in facts:
            nothing = dict.fromkeys(("bits", *HALVES), math.nan)
            yield float_model.row(*named, **nothing, seconds=0, peak_rss_bytes=0, notes=[facts["error"]])
            continue
        made = load_file(path.parent / "weights.safetensors")
        skipped = [name for name in layers if name not in made]
        stored = sum(facts["bytes"].values()) + sum(2 * floats[name].numel() for name in skipped)
        weights = {f"{name}.weight": made.get(name, floats[name]) for name in layers}
        plain.load_state_dict(weights, strict=False)
        figures = dict(zip(HALVES, float_model.judge(plain), strict=True))
        bits = 8 * stored / sum(weight.numel() for weight in floats.values())
        notes = [f"{len(skipped)} of {len(layers)} linears left in 16 bits"] if skipped else []
        same = {name: facts[name] for name in ("seconds", "peak_rss_bytes")}
        yield float_model.row(*named, bits=bits, **figures, **same, notes=notes)


def compared(rows: list[Row], floats: dict[str, tuple[float, float]]) -> Iterator[Row]:
    """For each model and width: fracbit, the best peer at no fewer bits, and the ratio of what they add."""
    for own in (row for row in rows if row["tool"] == "fracbit"):
        line = {name: own[name] for name in ("model", "asked", "bits")}
        same = [row for row in rows if row["model"] == own["model"] and row["asked"] == own["asked"]]
        least, most = own["bits"] - 1e-3, own["asked"] + SLACK
        peers = [row for row in same if row is not own and least <= row["bits"] <= most]
        for half, plain in zip(HALVES, floats[own["model"]], strict=True):
            added = own[half] - plain
            line[f"{half}_added"] = added
            if peers:
                best = min(peers, key=lambda row: row[half])
                gap = best[half] - plain
                line |= {f"{half}_peer": f"{best['tool']} {best['label']}", f"{half}_peer_bits": best["bits"]}
                line |= {f"{half}_peer_added": gap, f"{half}_ratio": added / gap if gap > 0 else math.inf}
        yield line


def show(rows: list[Row], floats: dict[str, tuple[float, float]], lines: list[Row]) -> None:
    def order(row: Row) -> tuple:
        return MODELS.index(row["model"]), row["asked"], row["tool"] != "fracbit", row["tool"], row["bits"]

    table(
        "model | tool | setting | bits | first texts | second texts | seconds | peak MB | notes",
        ([row["model"], row["tool"], row["label"], *(f"{row[name]:.3f}" for name in ("bits", *HALVES)), f"{row['seconds']:.0f}",
          f"{row['peak_rss_bytes'] / 1e6:.0f}", "; ".join(row["notes"])] for row in sorted(rows, key=order)),
    )  # fmt: skip
    cells = []
    for line in lines:
        figures = ["no peer at these bits", "", "", ""]
        if "first_ratio" in line:
            figures = [f"{line[name]:{places}}" for name, places in COMPARED.items()]
            figures.append(f"{line['first_peer']} ({line['first_peer_bits']:.3f} bits)")
        plain = floats[line["model"]][0]
        cells.append([line["model"], f"{plain:.3f}", line["asked"], f"{line['first_added']:.3f}", *figures])
    table("model | float | asked | fracbit adds | best peer adds | ratio | second texts: ratio | peer", cells)
    misses = sum(any(line.get(f"{half}_ratio", 0) > TARGET for half in HALVES) for line in lines)
    print(f"{len(lines) - misses} of {len(lines)} at most {TARGET} of the best peer on both texts")


def main() -> None:
    choices = {"models": MODELS, "peers": PEERS}
    parser = arguments(
        __doc__, choices, work=None, environments=ENVIRONMENTS, models=list(MODELS), peers=list(PEERS),
        json=RESULTS / "quality.json",
    )  # fmt: skip
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--only", choices=("run", "table"), help="run the tools, or evaluate what they left")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    environments = given.environments.resolve()
    rows: list[Row] = []
    floats: dict[str, tuple[float, float]] = {}
    for float_model in (find_float_model(model, work) for model in given.models):
        name = float_model.bed.name
        own = {width + 0.25: work / name / "fracbit" / f"{width + 0.25}" for width in given.widths}
        if given.only != "table":
            for peer in given.peers:
                run_peer(peer, float_model, given.widths, work / name / peer, environments)
            for asked, out in own.items():
                run_fracbit(float_model, asked, out)
        if given.only != "run":
            floats[name] = float_model.judge(float_model.load())
            for peer in given.peers:
                rows += peer_rows(peer, float_model, given.widths, work / name / peer)
            done = {asked: out for asked, out in own.items() if (out / "facts.json").exists()}
            rows += [fracbit_row(float_model, asked, out) for asked, out in done.items()]
    if given.only == "run":
        return
    say_machine()
    lines = list(compared(rows, floats))
    show(rows, floats, lines)
    protocol = f"{SAMPLES} x {LENGTH} calibration ids; judged on two sets of {DOCUMENTS} documents of as many"
    peak = {"bench_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    write_json(given.json, {"protocol": protocol, "float": floats, "rows": rows, "compared": lines, **peak})


if __name__ == "__main__":
    main()
