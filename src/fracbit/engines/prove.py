"""The proof of an export: what an engine computes from it, beside the fracbit checkpoint that it was made from.

export + ids -> the engine's own environment -> log-probabilities, greedy tokens, decoded weights
checkpoint + ids -> fracbit, fp32            -> the same                                            -> proof.json
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.load import tokenizer_or_none
from fracbit.checkpoint.output import write_json
from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.data.samples import read_calibration
from fracbit.engines.compared_with import ComparedWith, compared_with
from fracbit.engines.engine import ENGINES, RUNNERS, ServingEngine
from fracbit.engines.environments import ENVIRONMENTS, environment
from fracbit.errors import EngineError, FormatError, near_matches
from fracbit.records.files import named_path

PROOF = "proof.json"
TEXT = "bundled:held-out"
CHUNK = 1 << 24  # numbers that are hashed at a time


@dataclass(frozen=True)
class Difference:
    """How far an engine's predictions are from fracbit's, over the ids of a text.

    `mean` and `largest`: of |log-probability of the next id|, nats. `kl`, `kl_largest`: KL(fracbit || engine) of an id, nats.
    `agreement`: share of ids, 0..1, with the same most likely next one. `greedy`: share of greedy tokens that are equal,
    each up to the first that is not; None where the engine cannot be asked.
    """

    tokens: int
    mean: float
    largest: float
    kl: float
    kl_largest: float
    agreement: float
    greedy: float | None


@dataclass(frozen=True)
class Proof:
    """What `prove` found. `dtype`: what the engine computed in; `against`: the checkpoint, or "the export as fracbit reads it".

    `unequal`: layers whose decoded weights differ.

    `layers`: how many were compared; none where the engine does not show its weights. `text` and `protocol`: on which ids.
    """

    export: str
    format: str
    engine: str
    versions: Mapping[str, str]
    dtype: str
    against: str
    layers: int
    unequal: tuple[str, ...]
    text: str
    protocol: str
    difference: Difference | None

    def __str__(self) -> str:
        found = self.difference
        weights = (
            f"{self.layers - len(self.unequal)} of {self.layers} layers decode to equal weights; "
            if self.layers
            else ""
        )
        if found is None:
            return weights.removesuffix("; ")
        return (
            f"{weights}log-probabilities differ by {found.mean:.4f} (at most {found.largest:.3f}), KL {found.kl:.2e} nats "
            f"(at most {found.kl_largest:.2e}), same top token {found.agreement:.2%}"
            + ("" if found.greedy is None else f", greedy tokens equal {found.greedy:.2%}")
        )


def prove(
    folder: str | Path,
    engine: str | None = None,
    *,
    against: str | Path | None = None,
    text: str = TEXT,
    samples: int = 2,
    length: int = 128,
    greedy: int = 16,
    environments: str | Path = ENVIRONMENTS,
    announce: Callable[[str], None] | None = None,
) -> Proof:
    """Run an export, a folder or one file, in an engine, compare with the checkpoint, and write proof.json beside it (for
    model.gguf: model.gguf.proof.json).

    `engine`: a name of `ENGINES`; by default the first that runs the format. `against`: the checkpoint, by default the one that
    the manifest names; where that is gone, the export as fracbit's own reader decodes it. `text` is a source of ids as for
    calibration: `samples` of `length`, each continued by `greedy` tokens.
    The engine's environment is made below `environments` when it is missing, which needs a package index; `announce` is told.
    Raises `EngineError`, `RecipeError` for an unknown engine, `FormatError`, `SourceError`, `DataError`.
    """
    path = named_path(folder, EngineError)
    manifest = _manifest(path)
    asked = str(manifest["exported"])
    name, runs = _engine(engine, asked)
    origin = compared_with(path, manifest, against)
    tokenizer = tokenizer_or_none(origin.folder)
    vocabulary = int(origin.config.get_text_config().vocab_size)
    drawn = read_calibration([text], tokenizer, vocabulary, samples=samples, length=length, seed=0)
    ids = drawn.ids[:, :length].long()  # [samples, length]
    python = environment(name, runs, environments, announce)
    words = "" if tokenizer is None else "".join(str(tokenizer.decode(row)) for row in ids)
    facts, predicted = answered(path, runs, ids, python=python, text=words, greedy=greedy)
    difference = None
    if predicted is not None:
        with origin.model() as model:
            difference = compared(model, predicted)
    hashes: Mapping[str, Any] = facts["weights"]
    found = Proof(
        export=str(path), format=asked, engine=name, versions=facts["versions"], dtype=runs.dtype,
        against=origin.name, layers=len(hashes.keys() & origin.weights.keys()), unequal=tuple(_unequal(origin, hashes)),
        text=text,
        protocol=f"{samples} samples of {length} ids, {greedy} greedy tokens after each",
        difference=difference,
    )  # fmt: skip
    write_json(proof_of(path), asdict(found))
    return found


def proof_of(path: Path) -> Path:
    """Where the proof of an export is written."""
    return path.with_name(f"{path.name}.{PROOF}") if path.is_file() else path / PROOF


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    if path.is_file():
        if "exported" not in manifest:
            raise FormatError(
                f"{path} does not say what it was made of: fracbit did not write it as a file by itself, or its header was "
                f"changed since; name the folder that `fracbit export` wrote, or export again with -o {path.name}"
            )
        return manifest
    if not manifest or not (path / "config.json").is_file():
        raise FormatError(
            f"{path} is no export of fracbit; make one with `fracbit export CHECKPOINT --to FORMAT -o {path}`"
        )
    if "exported" not in manifest:
        raise FormatError(f"{path} is a fracbit checkpoint and no export; `fracbit verify` checks its files")
    return manifest


def _engine(engine: str | None, asked: str) -> tuple[str, ServingEngine]:
    """The engine of that name, or the first that runs the format `asked`. Raises `RecipeError` or `EngineError`."""
    format_ = asked.partition(":")[0]
    fitting = {name: each for name, each in ENGINES.items() if format_ in each.formats}
    if not fitting:
        raise EngineError(f"no engine runs the format {asked}; update fracbit, or export again")
    name = engine or next(iter(fitting))
    if ENGINES.check(name) not in fitting:
        raise EngineError(f"{name} does not run the format {asked}; {near_matches(name, fitting)}")
    return name, fitting[name]


@dataclass(frozen=True, eq=False)
class EnginePredictions:
    """What an engine predicts. `logits` [samples, n, vocabulary]: of `ids` [samples, length] from number `first` + 1 on.

    NaN stands for what it does not tell of very unlikely ids; then all are log-probabilities. `greedy` [samples, tokens]: how
    it continues every sample; None where it cannot be asked.
    """

    ids: Tensor
    logits: Tensor
    first: int = 0
    greedy: Tensor | None = None


def answered(
    path: Path, engine: ServingEngine, ids: Tensor, *, python: Path, text: str, greedy: int
) -> tuple[dict[str, Any], EnginePredictions | None]:
    """What an engine makes of `ids` [samples, length], or of their `text` where it must cut that itself.

    EnginePredictions are None where it only decodes weights. Raises `EngineError` with the engine's last words.
    """
    with tempfile.TemporaryDirectory() as place:
        np.save(f"{place}/ids.npy", ids.numpy())
        Path(place, "text.txt").write_text(text, encoding="utf-8")
        words = [python, RUNNERS / engine.runner, path.resolve(), f"{place}/ids.npy", f"{place}/out"]
        options = ["--dtype", engine.dtype, "--greedy", greedy, "--text", f"{place}/text.txt"]
        ran = subprocess.run(
            [str(word) for word in (*words, *options)],
            env={**os.environ, **engine.variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        out = Path(place) / "out"
        if ran.returncode or not (out / "facts.json").is_file():
            last = " ".join(ran.stderr.strip().splitlines()[-4:])[-600:]
            raise EngineError(f"{engine.title} does not run {path} (exit status {ran.returncode}): {last}")
        facts = json.loads((out / "facts.json").read_text())
        found = {name: torch.from_numpy(np.load(out / f"{name}.npy")) for name in facts["arrays"]}
        if "logits" not in found:
            return facts, None
        if not facts["in_part"] and bool(found["logits"].isnan().any()):
            raise EngineError(f"{engine.title} computes what is no number from {path}; try another engine")
        used = found.get("ids", ids).long()
        return facts, EnginePredictions(used, found["logits"], facts["first"], greedy=found.get("greedy"))


def compared(model: PreTrainedModel, found: EnginePredictions) -> Difference:
    """How far the predictions of an engine are from those of `model`."""
    last = found.first + found.logits.shape[1]
    with torch.no_grad():
        own = model(found.ids).logits.float()[:, found.first : last]  # [samples, n, vocabulary]
    after = found.ids[:, found.first + 1 : last + 1]  # [samples, n]
    each = map(_sample_apart, own, found.logits, after)
    apart, kl, agree = (torch.cat(rows) for rows in zip(*each, strict=True))  # [samples * n] each
    apart = apart[apart.isfinite()]  # an id that is not told has no difference
    return Difference(
        tokens=kl.numel(), mean=float(apart.mean()), largest=float(apart.max()), kl=float(kl.mean()),
        kl_largest=float(kl.max()), agreement=float(agree.float().mean()),
        greedy=None if found.greedy is None else _greedy_share(model, found.ids, found.greedy),
    )  # fmt: skip


def _greedy_share(model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> float:
    """The share of an engine's greedy tokens [samples, tokens] that are the model's, up to the first that is not."""
    count = greedy.shape[1]
    with torch.no_grad():
        whole = model.generate(  # type: ignore[operator]
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )  # fmt: skip
    same = (whole[:, ids.shape[1] :] == greedy).long().cumprod(1)  # [samples, tokens]
    return float(same.float().mean())


def _sample_apart(own: Tensor, theirs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sample's logits [n, vocabulary] for `ids` [n]: |difference| of log-probabilities, KL, and whether the top is equal.

    Each is [n]; in fp64, since the sum of a vocabulary's differences in fp32 is no smaller than some proofs.
    """
    theirs = theirs[:, : own.shape[-1]].double()  # [n, vocabulary]: engines may pad it
    if theirs.shape[-1] != own.shape[-1] or bool(theirs.isnan().all(-1).any()):
        raise EngineError(
            f"the engine gave {theirs.shape[-1]} numbers for an id, of a vocabulary of {own.shape[-1]}, or none: it does not "
            "run this model, or the checkpoint is another one"
        )
    told = ~theirs.isnan()  # [n, vocabulary]
    theirs = theirs.log_softmax(-1) if bool(told.all()) else theirs.nan_to_num(-math.inf)
    logs = own.double().log_softmax(-1)  # [n, vocabulary]
    apart = (theirs.gather(-1, ids[:, None]) - logs.gather(-1, ids[:, None])).abs()[:, 0]  # [n]
    kl = torch.where(told, logs.exp() * (logs - theirs), 0.0).sum(-1).clamp(min=0)  # [n]
    return apart, kl, logs.argmax(-1) == theirs.argmax(-1)


def _unequal(origin: ComparedWith, hashes: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Names of layers whose decoded weights an engine has differently, or not at all where it shows others."""
    for layer, weight in origin.weights.items() if hashes else ():
        found = hashes.get(layer)  # None: a module that the engine has joined with others
        if found is not None and weight_hash(weight().to(getattr(torch, found["dtype"]))) != found["sha256"]:
            yield layer


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's fp32 values, row by row; -0 counts as 0. As in runners/answer.py."""
    digest = hashlib.sha256()
    flat = weight.reshape(-1)  # [out * in]
    for first in range(0, len(flat), CHUNK):
        digest.update((flat[first : first + CHUNK].float() + 0.0).numpy().tobytes())
    return digest.hexdigest()
