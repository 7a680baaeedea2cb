"""What runners share: the arguments of their process and the files of their answer. It needs numpy alone."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy


def asked() -> argparse.Namespace:
    """The arguments: `export`, `ids` (.npy, int [samples, length]), `out`, `--dtype`, `--greedy` tokens after each sample.

    `--text`: a file with the text of all samples, for engines that take no ids.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--greedy", type=int, default=16)
    parser.add_argument("--text")
    given = parser.parse_args()
    given.ids = numpy.load(given.ids)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def hashed(weight):
    """SHA-256 of a decoded weight's fp32 values, row by row; -0 counts as 0."""
    return hashlib.sha256((numpy.ascontiguousarray(weight, numpy.float32) + 0.0).tobytes()).hexdigest()


def answer(out, versions, *, weights=None, first=0, in_part=False, **arrays):
    """Write the answer. `in_part`: NaN stands for what is not told.

    - `logits` fp32 [samples, n, vocabulary]: of the ids from number `first` + 1 on; `ids` where they are not those asked for.
    - `greedy` int [samples, tokens]; `weights`: by layer, the type that it was decoded to and the hash of what came out.
    """
    for name, array in arrays.items():
        numpy.save(out / f"{name}.npy", array)
    facts = {
        "versions": versions,
        "weights": weights or {},
        "first": first,
        "in_part": in_part,
        "arrays": list(arrays),
    }
    (out / "facts.json").write_text(json.dumps(facts))
