"""What settings lose on a real trained model: SmolLM2-135M-Instruct (bench/results/real.json, docs/quality.md).

    python bench/real/measure.py --work FOLDER [--settings "gptq 3" "AutoRound 3" ...] [--threads 1] [--minutes M]
    python bench/real/measure.py --work FOLDER --rescaled --settings ...    (bench/results/real_rescaled.json)

Every setting is one `fracbit quantize`, or one run of a peer, in a process of its own, calibrated on the same ids: 128 samples
of 512 from the first 70 % of WikiText-2's validation text. What comes out is judged by `fracbit eval`, that of a peer as a
plain model of its decoded weights: on the rest of that text, on which settings were chosen, and on texts that no choice has
seen: passages of novels (LAMBADA), the reference of Python's language, and conversations (questions of ARC-Easy with their
answers, through the chat template). Each by perplexity, KL divergence (mean and 99th percentile) and top-1 agreement, in fp32
over 16 windows of 512. Accuracy is zero-shot, over the first questions of three sets, for environments with fracbit[eval]. Bits
are stored bytes of the linears of the blocks; what a tool leaves in 16 bits counts as such. What FOLDER holds is neither made
nor judged again, and settings that are not named keep their rows in the result. `--rescaled` measures the model
of peers/rescaled.py, for widths at which the weights of the package lie on a grid.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import (
    ENVIRONMENTS,
    RESULTS,
    SHARED,
    UNFINISHED,
    Ran,
    Row,
    arguments,
    fracbit,
    machine,
    say_machine,
    table,
    write_json,
)
from peers.environments import quantize_with, run_peer
from peers.rescaled import rescaled

SAMPLES, LENGTH, TOKENS, QUESTIONS = 128, 512, 8192, 150
ASKED = {  # sets of questions, as lm-eval's task files name their fields
    "arc_easy": {"doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "piqa": {"doc_to_text": "{{query}}Answer:", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "winogrande": {
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
}
GPTQ = ("--quantizer=gptq",)
WEIGH, TRAIN = "--set=calibration.weigh=loss", "--set=calibration.tweak=train"
PRESETS = {
    f"{preset} {bits}": (preset, bits) for preset in ("fast", "good", "best") for bits in (2.25, 3.25, 4.25)
}
SETTINGS: dict[str, tuple[str, ...]] = {
    f"{name} {bits}": (f"--scheme=int{bits}z/64", *words)
    for bits in (2, 3, 4)
    for name, words in {
        "rtn": (),
        "rtn, search": ("--set=search=true",),
        "gptq, full ranges": (*GPTQ, "--set=search=false"),
        "gptq": GPTQ,
        "gptq, tweak auto": (*GPTQ, "--set=calibration.tweak=auto"),
        "gptq, weigh": (*GPTQ, WEIGH),
        "gptq, train": (*GPTQ, TRAIN),
        "gptq, weigh, train": (*GPTQ, WEIGH, TRAIN),
        "descent, weigh": ("--quantizer=descent", WEIGH),
    }.items()
} | {name: (f"--preset={preset}", f"--average-bits={bits}") for name, (preset, bits) in PRESETS.items()}
"""Options of `fracbit quantize`, by what a table calls them."""
GROUPED = {"group": 64, "sym": False}
K_TYPES = {2: ("Q2_K_S", "IQ2_M"), 3: ("Q3_K_S", "IQ3_XXS"), 4: ("Q4_K_S", "IQ4_XS")}
PEERS: dict[str, tuple[str, Row]] = {
    f"{name} {bits}": (peer, {"bits": bits, **setting})
    for bits in (2, 3, 4)
    for name, peer, setting in (
        ("AutoRound", "autoround", {**GROUPED, "iters": 200}),
        ("GPTQModel", "gptqmodel", GROUPED),
        ("GPTQModel, mse", "gptqmodel", {**GROUPED, "mse": 2.4}),
        ("llm-compressor", "llmcompressor", GROUPED),
        ("llm-compressor, mse", "llmcompressor", {**GROUPED, "observer": "mse"}),
        ("HQQ", "hqq", {"group": 64, "axis": 1}),
        ("HQQ, axis 0", "hqq", {"group": 64, "axis": 0}),
        *((f"llama.cpp {name}", "llamacpp", {"type": name}) for name in K_TYPES[bits]),
    )
}
"""A peer's name in peers/quantize.py and its setting, by what a table calls them."""


def float_model(work: Path, environments: Path) -> Path:
    """The checkpoint, made once."""
    folder = work / "smollm2"
    if not (folder / "config.json").is_file():
        run_peer("smollm2", "smollm2.py", [folder], environments, log=work / "smollm2.log")
    return folder


def texts(work: Path) -> dict[str, Path]:
    """The texts as files: `calibration`, and those to judge by."""
    from pydoc_data.topics import topics

    whole = (SHARED / "data" / "wikitext-2-valid.txt").read_text(encoding="utf-8")
    cut = whole.index("\n \n", int(len(whole) * 0.7))
    novels = read_lines(SHARED / "data" / "lambada-2000.jsonl")[:200]
    # From the end of the file, whose beginning is asked.
    answered = read_lines(SHARED / "data" / "zero-shot" / "arc_easy.jsonl")[-100:]
    found = {
        "calibration.txt": whole[:cut],
        "wikitext.txt": whole[cut:],
        "novels.txt": "\n\n".join(line["text"] for line in novels),
        "reference.txt": "\n\n".join(topics[name] for name in sorted(topics)),
        "chats.jsonl": "\n".join(json.dumps(chat(line)) for line in answered),
    }
    for name, text in found.items():
        (work / name).write_text(text, encoding="utf-8")
    return {Path(name).stem: work / name for name in found}


def read_lines(path: Path) -> list[Row]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(line: Row) -> Row:
    """A question of ARC-Easy with its answer, as a conversation."""
    asked = line["query"].removeprefix("Question: ") + "".join(f"\n- {choice}" for choice in line["choices"])
    answer = line["choices"][line["gold"]]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def questions(work: Path) -> list[Path]:
    """The task files for `fracbit eval --tasks`, with their data."""
    folder = work / "questions"
    folder.mkdir(exist_ok=True)
    for name, fields in ASKED.items():
        asked = read_lines(SHARED / "data" / "zero-shot" / f"{name}.jsonl")[:QUESTIONS]
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
        task = {
            "task": f"{name}_first", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "multiple_choice", "test_split": "test", **fields,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }  # fmt: skip
        (folder / f"{name}_first.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return [folder / f"{name}_first.yaml" for name in ASKED]


def ids(model: Path, files: dict[str, Path], work: Path) -> Path:
    """What every run is calibrated on, as a file: the ids that `fracbit quantize` draws, [SAMPLES, LENGTH]."""
    import numpy

    from fracbit.checkpoint.load import load_tokenizer
    from fracbit.data import read_calibration

    path, tokenizer = work / "calibration.npy", load_tokenizer(model)
    if not path.is_file():
        how = {"samples": SAMPLES, "length": LENGTH, "seed": 0}
        drawn = read_calibration([str(files["calibration"])], tokenizer, tokenizer.vocab_size, **how)
        numpy.save(path, drawn.ids.numpy())
    return path


def measured(name: str, model: Path, files: dict[str, Path], work: Path, given: Namespace) -> Row:
    """What a setting took (`costs`), where it was measured (`machine`, `note`), its `rows`, one a text, and its `accuracy`."""
    folder = work / name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)

    def made() -> Row:
        checkpoint, costs = (own if name in SETTINGS else peer)(name, model, files, folder, given)
        where = machine() | ({"threads": given.threads} if given.threads else {})
        return {"checkpoint": checkpoint.name, "costs": costs, "machine": where, "note": given.note}

    facts = kept(folder / "made.json", made)
    checkpoint = folder / facts["checkpoint"]
    found = {
        text: kept(folder / f"{text}.json", partial(judged, checkpoint, model, file))
        for text, file in files.items()
        if text != "calibration"
    }
    rows = [{"setting": name, "text": text, **facts["costs"], **row} for text, row in found.items()]
    return facts | {"rows": rows, "accuracy": accuracy(checkpoint, folder, work)}


def kept(path: Path, make: Callable[[], Row]) -> Row:
    """A file's JSON, written when it is missing."""
    if not path.is_file():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def accuracy(checkpoint: Path, folder: Path, work: Path) -> Row:
    """Share of right answers by set of questions, and their mean; empty without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None and not (folder / "accuracy.json").is_file():
        return {}

    def answered() -> Row:
        found, _ = fracbit(
            "eval", checkpoint, "--tasks", ",".join(map(str, questions(work))), "--dtype", "float32"
        )
        scores = {
            one["task"].removesuffix("_first"): one["metrics"]["acc"] for one in found["zero_shot"]["scores"]
        }
        return scores | {"mean": found["zero_shot"]["mean"]}

    return kept(folder / "accuracy.json", answered)


def own(name: str, model: Path, files: dict[str, Path], folder: Path, given: Namespace) -> tuple[Path, Row]:
    """A checkpoint of fracbit, and what it took."""
    free = name.startswith(("rtn", "fast"))
    data = () if free else ("--calibration", ids(model, files, folder.parent))
    sizes = [f"--set=calibration.{key}={value}" for key, value in (("samples", SAMPLES), ("length", LENGTH))]
    words = (*SETTINGS[name], *data, *(sizes if data else ()))
    made, ran = fracbit(
        "quantize", model, "-o", folder / "checkpoint", *words, "--overwrite", threads=given.threads
    )
    return folder / "checkpoint", {"bits": made["bits_per_weight"], **cost(ran)}


def peer(name: str, model: Path, files: dict[str, Path], folder: Path, given: Namespace) -> tuple[Path, Row]:
    """A plain checkpoint in fp32 of what a peer made, decoded, and what it took."""
    from safetensors.torch import load_file, save_file

    tool, setting = PEERS[name]
    facts, costs = folder / "made" / "facts.json", folder / "costs.json"
    if not costs.is_file():
        one = [{"label": "made", **setting}]
        ran = quantize_with(
            tool, model, ids(model, files, folder.parent), folder, one, given.environments.resolve(),
            folder / "log.txt", given.threads,
        )  # fmt: skip
        costs.write_text(json.dumps(cost(ran)))
    done = json.loads(facts.read_text()) | json.loads(costs.read_text())
    if "error" in done:
        costs.unlink()
        raise SystemExit(f"{name}: {done['error']}; see {folder / 'log.txt'}")
    made = load_file(folder / "made" / "weights.safetensors")
    whole = {key: tensor.float() for key, tensor in load_file(model / "model.safetensors").items()}
    linears = [key for key in whole if ".layers." in key and key.endswith("_proj.weight")]
    weights = {f"{key}.weight": tensor for key, tensor in made.items()}
    assert weights.keys() <= set(linears)
    stored = sum(done["bytes"].values()) + sum(
        2 * whole[key].numel() for key in linears if key not in weights
    )
    bits = 8 * stored / sum(whole[key].numel() for key in linears)
    plain = folder / "decoded"
    shutil.copytree(model, plain, dirs_exist_ok=True)
    save_file(whole | weights, plain / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder / "made")
    took = {key: done[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "versions")}
    return plain, {"bits": bits, **took}


def cost(ran: Ran) -> Row:
    """What a process took."""
    return {"seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds, "peak_rss_bytes": ran.peak_rss_bytes}


def plain(model: Path, files: dict[str, Path], work: Path) -> dict[str, float]:
    """Perplexity of the float model on each text that is judged by."""
    (work / "float").mkdir(exist_ok=True)
    return {
        text: kept(work / "float" / f"{text}.json", partial(alone, model, file))["perplexity"]
        for text, file in files.items()
        if text != "calibration"
    }


def alone(model: Path, file: Path) -> Row:
    """A model on the first `TOKENS` of a text."""
    found, _ = fracbit("eval", model, *how(file))
    return found


def how(file: Path) -> tuple[object, ...]:
    """The protocol, as options of `fracbit eval`."""
    return ("--text", f"{file}?keep={TOKENS}", "--window", LENGTH, "--dtype", "float32")


def judged(checkpoint: Path, model: Path, file: Path) -> Row:
    """A checkpoint beside its float model on the first `TOKENS` of a text."""
    found, _ = fracbit("eval", checkpoint, "--against", model, *how(file))
    away = found["divergence"]
    return {
        "nll": found["nll"], "perplexity": found["perplexity"], "kl": away["kl"], "kl_p99": away["kl_p99"],
        "agreement": away["agreement"],
    }  # fmt: skip


def main() -> None:
    every = [*SETTINGS, *PEERS]
    parser = arguments(__doc__, work=None, environments=ENVIRONMENTS, threads=None, minutes=600.0, json=None)
    parser.add_argument("--rescaled", action="store_true", help="the same function with weights on no grid")
    parser.add_argument("--settings", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--note", default="", help="what to know of these figures, such as other work beside")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model, files = float_model(work, given.environments.resolve()), texts(work)
    if given.rescaled:
        work = work / "of-rescaled"
        model = rescaled(model, work / "rescaled")
    to = given.json or RESULTS / ("real_rescaled.json" if given.rescaled else "real.json")
    floats, right = plain(model, files, work), accuracy(model, work / "float", work)
    started = time.monotonic()
    known = json.loads(to.read_text()) if to.is_file() else {"rows": [], "measured": {}}
    rows = [row for row in known["rows"] if row["setting"] in every and row["setting"] not in given.settings]
    places = {
        name: place
        for name, place in known["measured"].items()
        if name in every and name not in given.settings
    }
    for name in given.settings:
        if time.monotonic() - started > 60 * given.minutes:
            raise SystemExit(UNFINISHED)
        found = measured(name, model, files, work, given)
        rows += found["rows"]
        places[name] = {"machine": found["machine"], "note": found["note"], "accuracy": found["accuracy"]}
    rows.sort(key=lambda row: every.index(row["setting"]))
    say_machine()
    table("text | perplexity of the float model", ((text, f"{found:.2f}") for text, found in floats.items()))
    table(
        "setting | text | bits | perplexity | KL | 99 % below | same top token | seconds | of processors | peak MB",
        ([row["setting"], row["text"], f"{row['bits']:.3f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}",
          f"{row['kl_p99']:.3f}", f"{100 * row['agreement']:.2f} %", f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}",
          f"{row['peak_rss_bytes'] / 1e6:.0f}"] for row in rows),
    )  # fmt: skip
    of_text = {(row["setting"], row["text"]): row for row in rows}
    table(
        f"setting | bits | of processors | peak GB | {' | '.join(f'perplexity: {text}' for text in floats)} | "
        + " | ".join(f"KL: {text}" for text in floats) + " | right answers",
        (summary(name, [of_text.get((name, text)) for text in floats], place.get("accuracy", {}))
         for name, place in places.items()),
    )  # fmt: skip
    protocol = (
        f"{SAMPLES} x {LENGTH} ids to calibrate; judged on {TOKENS} tokens of each text, window {LENGTH}"
    )
    write_json(
        to,
        {"protocol": protocol, "float": floats, "float accuracy": right, "rows": rows, "measured": places},
    )


def summary(name: str, some: list[Row | None], right: Row) -> list[str]:
    """A setting's line of the table: what it took and its figures on every text; `-` where it was not judged."""
    first = next(row for row in some if row)
    of = [(f"{row['perplexity']:.2f}", f"{row['kl']:.3f}") if row else ("-", "-") for row in some]
    return [
        name, f"{first['bits']:.3f}", f"{first['cpu_seconds']:.0f}", f"{first['peak_rss_bytes'] / 1e9:.2f}",
        *(perplexity for perplexity, _ in of), *(kl for _, kl in of), f"{100 * right['mean']:.1f} %" if right else "-",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
