"""What GGUF files lose: fracbit's beside those of llama-quantize, whole files of equal bytes (bench/results/gguf_quality.json,
docs/engines.md).

    python bench/engines/gguf_quality.py --work FOLDER [--types Q4_K_M Q3_K_M Q2_K] [--presets best good] [--threads 1]

The texts are those of real/measure.py, in the same FOLDER; the model is the one that peers/rescaled.py makes of it, whose
weights lie on no grid.

llama.cpp gets an importance matrix of the very ids that fracbit is calibrated on; its types are what `llama-quantize` makes of
a name, which falls back where 256 does not divide a row. fracbit gets the bytes of that file as its budget:
`quantize --for llama.cpp --preset P --size BYTES`. Both files are decoded and judged by `fracbit eval` on the texts of
real/measure.py: KL divergence to the float model, perplexity, top-1 agreement in fp32.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ENVIRONMENTS, RESULTS, Row, arguments, fracbit, machine, say_machine, table, write_json
from peers.environments import run_peer
from peers.rescaled import rescaled
from real.measure import LENGTH, SAMPLES, cost, float_model, ids, judged, kept, texts

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
PRESETS = ("good", "best")


def theirs(kind: str, model: Path, calibration: Path, work: Path, given: Namespace) -> tuple[Path, Row]:
    """llama.cpp's file of a type, in a folder with the model's tokenizer, and what it took."""
    folder = work / "files" / "theirs"
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / "facts.json"
    if not facts.is_file() or kind not in json.loads(facts.read_text()):
        words, log = (model, calibration, folder, *given.types), folder / "log.txt"
        ran = run_peer(
            "llamacpp", "llama_types.py", words, given.environments.resolve(), threads=given.threads, log=log
        )
        if ran.status:
            raise SystemExit(f"llama.cpp did not make {kind}; see {log}")
    made = json.loads(facts.read_text())[kind]
    place = beside_tokenizer(folder / f"{kind}.gguf", model, work / "files" / kind)
    return place, {"seconds": made["seconds"], "bytes": made["bytes"], "types": counted(made["tensors"])}


def beside_tokenizer(file: Path, model: Path, folder: Path) -> Path:
    """The folder, with the file and the tokenizer of the model."""
    folder.mkdir(exist_ok=True)
    for name in (*model.glob("*token*"), *model.glob("chat_template*")):
        shutil.copy(name, folder)
    if file.is_file():
        file.replace(folder / file.name)
    return folder


def counted(tensors: dict[str, list]) -> dict[str, str]:
    """How many tensors of each kind have which type: {"ffn_down": "15 Q6_K, 15 Q4_K"}."""
    found: dict[str, Counter] = {}
    for name, (kind, _) in tensors.items():
        if kind != "F32":
            found.setdefault(name.removesuffix(".weight").rpartition(".")[2], Counter())[kind] += 1
    return {
        name: ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) for name, kinds in found.items()
    }


def ours(
    preset: str, size: int, model: Path, calibration: Path, folder: Path, given: Namespace
) -> tuple[Path, Row]:
    """Our file of at most `size` bytes, and what it took."""
    from gguf import GGUFReader

    def made() -> Row:
        words = [
            f"--set=calibration.{key}={value}" for key, value in (("samples", SAMPLES), ("length", LENGTH))
        ]
        words += [
            "--for",
            "llama.cpp",
            "--preset",
            preset,
            "--size",
            size,
            "--calibration",
            calibration,
            "--overwrite",
        ]
        _, ran = fracbit("quantize", model, "-o", folder / "made", *words, threads=given.threads)
        file = folder / "made" / "model.gguf"
        tensors = {each.name: [each.tensor_type.name, int(each.n_bytes)] for each in GGUFReader(file).tensors}
        return {**cost(ran), "bytes": file.stat().st_size, "types": counted(tensors)}

    folder.mkdir(parents=True, exist_ok=True)
    return folder / "made", kept(folder / "took.json", made)


def main() -> None:
    parser = arguments(
        __doc__, work=None, environments=ENVIRONMENTS, threads=None, json=RESULTS / "gguf_quality.json"
    )
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--note", default="", help="what to know of these figures, such as other work beside")
    given = parser.parse_args()
    work = given.work.resolve()
    model, files = rescaled(float_model(work, given.environments.resolve()), work / "rescaled"), texts(work)
    calibration = ids(model, files, work)
    rows: list[Row] = []
    for kind in given.types:
        place, took = theirs(kind, model, calibration, work, given)
        makers = [("llama-quantize", place, took)]
        for preset in given.presets:
            folder = work / "files" / f"{preset}-{kind}"
            makers.append(
                (f"fracbit {preset}", *ours(preset, took["bytes"], model, calibration, folder, given))
            )
        for maker, folder, took in makers:
            for text, file in files.items():
                if text != "calibration":
                    found = kept(
                        folder.parent / f"{folder.name}-{text}.json", partial(judged, folder, model, file)
                    )
                    rows.append({"file": kind, "maker": maker, "text": text, **took, **found})
    theirs_kl = {(row["file"], row["text"]): row["kl"] for row in rows if row["maker"] == "llama-quantize"}
    for row in rows:
        row["share"] = row["kl"] / theirs_kl[row["file"], row["text"]]
    say_machine()
    table(
        "file | maker | text | bytes | seconds | perplexity | KL | of llama.cpp's | same top token",
        ([row["file"], row["maker"], row["text"], str(row["bytes"]), f"{row['seconds']:.0f}", f"{row['perplexity']:.2f}",
          f"{row['kl']:.4f}", f"{row['share']:.2f}", f"{100 * row['agreement']:.1f} %"] for row in rows),
    )  # fmt: skip
    for kind, maker, types in {(row["file"], row["maker"], json.dumps(row["types"])) for row in rows}:
        print(f"{kind}, {maker}: {types}")
    protocol = f"KL to the float model in fp32, 16 windows of {LENGTH} ids of each text; calibration: {SAMPLES} x {LENGTH} ids"
    write_json(given.json, {"protocol": protocol, "rows": rows, "machine": machine(), "note": given.note})


if __name__ == "__main__":
    main()
