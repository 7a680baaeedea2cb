"""What runners share: the arguments of their process and the files of their answer. It needs numpy alone."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy


def asked() -> argparse.Namespace:
    """The arguments: `export`, `ids` (.npy, int [samples, length]), `out`, `--dtype`, `--greedy` tokens after each sample."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--greedy", type=int, default=16)
    given = parser.parse_args()
    given.ids = numpy.load(given.ids)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def hashed(weight):
    """SHA-256 of a decoded weight's fp32 values, row by row; -0 counts as 0."""
    return hashlib.sha256((numpy.ascontiguousarray(weight, numpy.float32) + 0.0).tobytes()).hexdigest()


def answer(out, versions, **found):
    """Write the answer.

    - `logits` fp32 [samples, length - 1, vocabulary]: of the ids from the second on; `greedy` int [samples, tokens].
    - `weights`: by layer, the type that it was decoded to and the hash of what came out.
    """
    for name in ("logits", "greedy"):
        if name in found:
            numpy.save(out / f"{name}.npy", found[name])
    facts = {"versions": versions, "weights": found.get("weights", {})}
    (out / "facts.json").write_text(json.dumps(facts))
