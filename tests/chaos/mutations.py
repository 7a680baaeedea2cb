"""What is changed at random, and which law holds afterwards: checkpoints, sources, settings, stores, texts, command lines."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import fracbit
from chaos import changes
from chaos.boundary import hostile_call
from chaos.trials import Broken, Change, command
from families import tiny_llama
from fracbit.checkpoint.export.gguf.pretokenizers import HASHES, sample_hash
from fracbit.errors import FracbitError
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import contents
from texts import SENTENCE, byte_tokenizer, write_ids

Judge = Callable[[], str]
EXPORTS = {
    "compressed-tensors": "int:step4/32",
    "gptq": "int:step4z/32",
    "awq": "int:step4z/32",
    "mlx": "int:step4f/32",
    "gguf": "int:step8/32",
}
DONE, REFUSED, FAILED = 0, 2, 1
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Grounds:
    """What trials begin with, made once in a folder: models, checkpoints, exports, texts, settings, a store."""

    folder: Path

    @cached_property
    def float(self) -> Path:
        """A tiny float model with a tokenizer."""
        place = self.folder / "float"
        if not place.exists():
            tiny_llama(
                num_hidden_layers=2, vocab_size=259, hidden_size=64, intermediate_size=96, head_dim=16
            ).save_pretrained(place)
            byte_tokenizer(template=TEMPLATE).save_pretrained(place)
        return place

    @cached_property
    def packed(self) -> Path:
        """A fracbit checkpoint with every part that a packed tensor can have."""
        schemes = {
            "*.up_proj": Scheme("int", 3, 16, offset="zero"),
            "*.down_proj": Scheme("kmeans:row", 2, "row"),
            "*.q_proj": Scheme("nf", 4, 16, scale=Scheme("int", 8, 16)),
            "*.k_proj": Scheme("int", 5, "tensor", offset="float", scale="fp32"),
        }
        overrides = tuple(Override(layers=name, scheme=scheme) for name, scheme in schemes.items())
        return self._quantized("packed", Recipe(
            model=str(self.float), scheme=Scheme("int", 4, 16), embeddings=Scheme("int", 8, 16), outliers="random:0.1",
            overrides=(*overrides, Override(layers="*.v_proj", keep=True)),
        ))  # fmt: skip

    @cached_property
    def foreign(self) -> dict[str, Path]:
        """The float model in the formats of other programs, by the names of these."""
        made = {}
        for name, scheme in EXPORTS.items():
            made[name] = self.folder / name
            if not made[name].exists():
                packed = self._quantized(f"for-{name}", Recipe(model=str(self.float), scheme=scheme))
                own = {"tiny": (sample_hash(byte_tokenizer()),)}
                with patch.dict(HASHES, own):  # llama.cpp does not know a tokenizer of bytes
                    fracbit.export(packed, made[name], name)
        return made

    def _quantized(self, name: str, recipe: Recipe) -> Path:
        place = self.folder / name
        if not place.exists():
            fracbit.quantize(recipe, place, progress=None)
        return place

    @cached_property
    def ids(self) -> Path:
        """Random ids."""
        place = self.folder / "ids.u16"
        write_ids(place, 12, 32, 259)
        return place

    @cached_property
    def text(self) -> Path:
        """Sentences."""
        place = self.folder / "text.txt"
        place.write_text(SENTENCE * 60)
        return place

    @cached_property
    def sweep(self) -> str:
        """A sweep file."""
        return SWEEP.format(folder=self.folder, ids=self.ids, model=self.float.name)

    @cached_property
    def store(self) -> Path:
        """The store of a finished sweep."""
        place, file = self.folder / "store.db", self.folder / "sweep.toml"
        file.write_text(self.sweep)
        if not place.exists():
            code, said = command("sweep", str(file), "--store", str(place))
            assert code == DONE, said
            with closing(sqlite3.connect(place)) as link:
                link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                link.execute("PRAGMA journal_mode=DELETE")
        return place


RECIPE = """model = "{model}"
quantizer = "{quantizer}"
search = true
seed = 3
outliers = "cost:0.05"
embeddings = "int8/16"

[scheme]
dtype = "int"
bits = 4
block = 16
axis = "in"
offset = "zero"
scale = "fp16"

[calibration]
texts = ["{ids}?length=32"]
samples = 4
length = 16
batch = 2
chain = "quantized"
transforms = ["rotate", "smooth"]
inputs = "int8/token"
axis = "nearest"
tweak = "closed"

[[overrides]]
layers = "*.down_proj"
scheme = "nf4/16"

[[overrides]]
layers = "*.v_proj"
keep = true
"""
SWEEP = """models = ["{model}"]
root = "{folder}"
baseline = true
embeddings = "int8/16"

[evaluation]
text = "{ids}?length=32"
window = 32
stride = 16

[calibration]
text = "{ids}?length=32"
samples = 4
length = 16

[[arm]]
name = "first"
dtypes = ["int", "nf"]
bits = [3, 4]
blocks = [16, "row"]
axes = ["in"]
offsets = ["none"]
scales = ["fp16"]
quantizers = ["rtn"]
seeds = [0]

[[arm.exclude]]
dtype = "nf"
block = "row"
"""


def mutated_checkpoint(grounds: Grounds) -> Change:
    """A finished checkpoint: what loads after `verify` is what was written; the rest is refused by name."""
    whole = {name: tensor.clone() for name, tensor in fracbit.load(grounds.packed).state_dict().items()}
    written = contents(grounds.packed)

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        place = shutil.copytree(grounds.packed, folder / "q")
        said = changes.any_of(chance, place)
        same = contents(place) == written

        def judge() -> str:
            loaded = _loaded(place)
            sound = _verified(place)
            if (
                sound
                and not same
                and any(
                    path.name in written for path in place.iterdir() if path.name not in ("fracbit.json",)
                )
            ):
                _check_same(place, written)
            if sound and loaded is not None:
                _check_equal(whole, loaded)
            for words in (
                ("inspect", str(place)),
                ("verify", str(place)),
                ("eval", str(place), "--text", f"{grounds.ids}?length=32&first=2", "--window", "32"),
            ):
                _run(*words)
            return "unharmed: " if loaded is not None and sound else "refused: "

        return said, judge

    return change


def mutated_source(grounds: Grounds) -> Change:
    """A float model: quantized into a sound checkpoint, or refused with nothing that loads."""

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        place = shutil.copytree(grounds.float, folder / "float")
        said = changes.any_of(chance, place)
        calibrated = chance.random() < 0.3
        return said, lambda: _quantize(place, folder / "out", grounds if calibrated else None)

    return change


def mutated_foreign(grounds: Grounds) -> Change:
    """A checkpoint in another program's format: the same law as for a float model."""
    made = grounds.foreign

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        name = chance.choice(sorted(made))
        place = shutil.copytree(made[name], folder / "foreign")
        said = changes.any_of(chance, place)

        def judge() -> str:
            file = next(place.glob("*.gguf"), None)
            for words in (("inspect", str(file or place)), ("verify", str(file or place))):
                _run(*words)
            return _quantize(file or place, folder / "out")

        return f"{name}/{said}", judge

    return change


def mutated_recipe(grounds: Grounds) -> Change:
    """A recipe file: carried out, or refused before anything is written."""

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        whole = RECIPE.format(
            model=grounds.float, ids=grounds.ids, quantizer=chance.choice(("gptq", "descent"))
        )
        found, said = changes.text(chance, whole)
        file = folder / "recipe.toml"
        file.write_text(found, encoding="utf-8")
        return said, lambda: _output(folder / "out", _run("quantize", str(file), "-o", str(folder / "out")))

    return change


def mutated_sweep(grounds: Grounds) -> Change:
    """A sweep file: measured, or refused."""

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        found, said = changes.text(chance, grounds.sweep)
        file, store = folder / "sweep.toml", folder / "s.db"
        file.write_text(found, encoding="utf-8")

        def judge() -> str:
            _run("sweep", str(file), "--store", str(store), "--dry-run")
            return _outcome(_run("sweep", str(file), "--store", str(store)))

        return said, judge

    return change


def mutated_store(grounds: Grounds) -> Change:
    """A store: read, continued and drawn, or refused; never with other numbers than it holds."""

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        place = Path(shutil.copy(grounds.store, folder / "s.db"))
        said = _other_rows(chance, place) if chance.random() < 0.7 else changes.raw(chance, place)
        file = folder / "sweep.toml"
        file.write_text(grounds.sweep)

        def judge() -> str:
            first = _run(
                "report",
                str(place),
                "-o",
                str(folder / "page.html"),
                "--export",
                str(folder / "rows.parquet"),
            )
            second = _run("sweep", str(file), "--store", str(place))
            return _outcome(max(first, second))

        return said, judge

    return change


def _other_rows(chance: random.Random, place: Path) -> str:
    with closing(sqlite3.connect(place)) as link:
        table = chance.choice(("rows", "rows", "rows", "fracbit_store", "claims", "owners"))
        names = [row[1] for row in link.execute(f"PRAGMA table_info({table})")]
        name = chance.choice([*names, "record", "record"]) if table == "rows" else chance.choice(names)
        other = chance.choice(
            [
                each
                for each in changes.HOSTILE
                if each is None
                or (
                    isinstance(each, str | int | float)
                    and each != "\ud800"
                    and abs(each if isinstance(each, int | float) else 0) < 2**63
                )
            ]
        )
        if chance.random() < 0.1:
            link.execute(f"DROP TABLE {table}")
            link.commit()
            return f"without {table}"
        if name == "record":
            key, record = chance.choice(link.execute("SELECT key, record FROM rows ORDER BY key").fetchall())
            tree, said = changes.value(chance, json.loads(record))
            link.execute("UPDATE rows SET record = ? WHERE key = ?", (json.dumps(tree), key))
        else:
            said = f"{name} = {other!r:.60}"
            try:
                link.execute(
                    f'UPDATE {table} SET "{name}" = ? WHERE rowid = (SELECT min(rowid) FROM {table})',
                    (other,),
                )
            except sqlite3.IntegrityError:
                link.execute(f"DELETE FROM {table}")
        link.commit()
    return f"{table}.{said}"


def mutated_text(grounds: Grounds) -> Change:
    """Files of text and ids, and the options behind them: read, or refused."""
    made = _texts(grounds)

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        name, data = chance.choice(sorted(made.items()))
        file = folder / name
        file.write_bytes(data)
        said = changes.raw(chance, file) if chance.random() < 0.6 else _other_record(chance, file)
        options = _text_options(chance)
        words = ["eval", str(grounds.packed), "--text", f"{file}{options}", "--window", "32"]
        if chance.random() < 0.5:
            words = ["quantize", str(grounds.float), "-o", str(folder / "out"), "--quantizer", "gptq", *SHORT]
            words += ["--calibration", f"{file}{options}"]
        return f"{name}{options}: {said}", lambda: _output(folder / "out", _run(*words))

    return change


SHORT = ("--set", "calibration.samples=2", "--set", "calibration.length=16")


def _texts(grounds: Grounds) -> dict[str, bytes]:
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = np.random.default_rng(0).integers(3, 250, 400)
    chats = [
        {
            "messages": [
                {"role": "user", "content": SENTENCE},
                {"role": "assistant", "content": [{"type": "text", "text": SENTENCE}]},
            ]
        }
    ] * 12
    held, table = io.BytesIO(), io.BytesIO()
    np.save(held, ids.astype(np.int64))
    pq.write_table(pa.table({"text": [SENTENCE * 3] * 8}), table)
    return {
        "a.txt": grounds.text.read_bytes(), "b.u16": grounds.ids.read_bytes(), "c.npy": held.getvalue(),
        "d.parquet": table.getvalue(),
        "e.jsonl": "\n".join(json.dumps(each) for each in chats).encode(),
        "f.json": json.dumps([{"text": SENTENCE * 2}] * 8).encode(), "g.u32": ids.astype("<u4").tobytes(),
        "h.jsonl": "\n".join(json.dumps({"text": SENTENCE * 2}) for _ in range(8)).encode(),
    }  # fmt: skip


def _other_record(chance: random.Random, file: Path) -> str:
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        tree, said = changes.value(chance, json.loads(lines[0]))
        file.write_text("\n".join([json.dumps(tree), *lines[1:]]))
        return said
    return changes.fields(chance, file) if file.suffix == ".json" else changes.raw(chance, file)


def _text_options(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return ""
    names = ("length", "first", "keep", "column", "skip", "seed", "split", "bos", "config", "x")
    pairs = [
        f"{chance.choice(names)}={chance.choice((0, -1, 1, 7, 2**40, 'x', '', 'text', '1e9', 'nan'))}"
        for _ in range(chance.choice((1, 1, 2)))
    ]
    return "?" + "&".join(pairs)


def hostile_command(grounds: Grounds) -> Change:
    """Any command with a hostile value for one of its options or arguments: done, or refused."""
    plain = _commands(grounds)
    options = {name: _options_of(name) for name in plain}

    def change(chance: random.Random, folder: Path) -> tuple[str, Judge]:
        name = chance.choice(sorted(plain))
        words = [word.replace("OUT", str(folder / "out")) for word in plain[name]]
        other = str(
            chance.choice([*(each for each in changes.HOSTILE if each not in ("\u0000", "\ud800")), *WORDS])
        )
        flag = chance.choice(["", *options[name]])
        takes = bool(flag) and options[name][flag]
        if takes and flag in words:
            words[words.index(flag) + 1] = other
        elif flag:
            words += [flag, other] if takes else [flag]
        else:
            words[chance.randrange(len(words))] = other
        return f"{name} {flag} {other!r:.60}", lambda: _output(folder / "out", _run(name, *words, cwd=folder))

    return change


WORDS = (
    "nf4/64", "int9/64", "int4/0", "int4/-1", "kmeans:x4/64", "a" * 300, "/" + "a/" * 3000, "/proc/self/mem", "/dev/null",
    "/sys/x", "nan", "1e400", "-1e9", "999999999999999999999", "postgresql://u@h:notaport/d", "sqlite://", "http://x", "?",
    "x?length=", "x?length=-1&first=x", "*", "[", "\u202e", "\udcff", "ids.u16?first=99999999999999999999", "1.2GBB", "-5GB",
    "infGB", "0", "cost:nan", "gptq:damping=nan", "train:epochs=-1", "int8/x", "block", "help", "scheme.bits=nan",
    "calibration.samples=1e99", "run.device=tpu", "run.shard_mb=-1", "a=b=c", "=", "scheme={}", "scheme=[[", "scheme.axis=out",
)  # fmt: skip


def _commands(grounds: Grounds) -> dict[str, list[str]]:
    """A command line of each command that works; OUT is a place that does not exist."""
    model, packed, text = str(grounds.float), str(grounds.packed), f"{grounds.ids}?length=32&first=4"
    ctensors = str(grounds.foreign["gptq"])
    read = ["--calibration", str(grounds.text), "--samples", "2", "--length", "16"]
    return {
        "quantize": [model, "-o", "OUT", "--scheme", "int4/16"],
        "eval": [packed, "--text", text, "--window", "32"],
        "export": [packed, "--to", "float", "-o", "OUT"],
        "tweak": [ctensors, *read, "-o", "OUT"],
        "refine": [ctensors, "--against", model, *read, "-o", "OUT"],
        "inspect": [packed],
        "verify": [packed],
        "generate": [packed, "Once", "--max-new-tokens", "3"],
        "bench": [packed, "--max-new-tokens", "2"],
        "score": [model, "-o", "OUT"],
        "plan": [model, "--average-bits", "4.5", "-o", "OUT.json"],
        "prune": [model, "--text", text, "-o", "OUT"],
        "lens": [model, "--text", text, "-o", "OUT"],
        "sweep": [str(grounds.folder / "sweep.toml"), "--store", "OUT.db", "--dry-run"],
        "report": [str(grounds.store), "-o", "OUT.html"],
        "task": ["continuation", str(grounds.text), "-o", "OUT", "--model", model],
    }


def _options_of(name: str) -> dict[str, bool]:
    """The options of a command, and whether each takes a value."""
    import typer

    from fracbit.cli import app

    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    skipped = ("--help", "--ray", "--address", "--trust-remote-code", "--watch")
    return {
        max(each.opts, key=len): not getattr(each, "is_flag", False)
        for each in found.params
        if each.param_type_name == "option" and not set(each.opts) & set(skipped)
    }


def _run(*words: str, cwd: Path | None = None) -> int:
    """The exit code of a command, which is 0, 1 or 2."""
    import os

    if cwd is not None:
        os.chdir(cwd)
    code, said = command(*words)
    if code not in (DONE, FAILED, REFUSED):
        raise Broken(f"fracbit {words[0]} ended with {code}: {said[-200:]}")
    if "Traceback" in said:
        raise Broken(f"fracbit {words[0]} printed a traceback: {said[-300:]}")
    return code


def _outcome(code: int) -> str:
    return "refused: " if code else "unharmed: "


def _quantize(source: Path, out: Path, calibrated: Grounds | None = None) -> str:
    words = ["quantize", str(source), "-o", str(out), "--scheme", "int4/16"]
    if calibrated is not None:
        words += ["--quantizer", "gptq", "--calibration", f"{calibrated.ids}?length=32", *SHORT]
    return _output(out, _run(*words))


def _output(out: Path, code: int) -> str:
    """The law of every output: what was refused left nothing that loads, what was done is sound."""
    if out.is_dir() and (out / "fracbit.json").is_file() and code == DONE:
        faults = fracbit.verify(out, progress=None).faults
        if faults:
            raise Broken(f"the output does not verify: {faults[0]}")
    if (
        code == REFUSED
        and out.is_dir()
        and (out / "config.json").is_file()
        and not (out / ".fracbit").is_dir()
    ):
        raise Broken("refused, but an output is there")
    return _outcome(code)


def _loaded(place: Path) -> dict[str, Tensor] | None:
    try:
        return dict(fracbit.load(place).state_dict())
    except FracbitError:
        return None


def _verified(place: Path) -> bool:
    try:
        return not fracbit.verify(place, progress=None).faults
    except FracbitError:
        return False


def _check_same(place: Path, written: dict[str, str]) -> None:
    """Where `verify` finds nothing, all files but the manifest are those that were written."""
    found = contents(place)
    other = [name for name, digest in written.items() if found.get(name) != digest and name != "fracbit.json"]
    if other:
        raise Broken(f"verify finds nothing, and {other[0]} has changed")


def _check_equal(whole: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    if whole.keys() != loaded.keys():
        raise Broken("verify finds nothing, and the loaded model has other tensors")
    for name, tensor in whole.items():
        if not torch.equal(tensor, loaded[name]):
            raise Broken(f"verify finds nothing, and {name} is another")


KINDS: dict[str, Callable[[Grounds], Change]] = {
    "checkpoint": mutated_checkpoint,
    "source": mutated_source,
    "foreign": mutated_foreign,
    "recipe": mutated_recipe,
    "sweep": mutated_sweep,
    "store": mutated_store,
    "text": mutated_text,
    "command": hostile_command,
    "native": hostile_call,
}
