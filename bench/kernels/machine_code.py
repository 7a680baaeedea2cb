"""What the machine code of the Triton GEMV leaves possible of an H100's memory bandwidth. Needs Triton, no GPU.
Makes the table of instructions a weight in docs/serving.md.

    python bench/kernels/machine_code.py

Counts instructions a weight and thread, the loop and what is around it, and takes the rates of compute capability 9.0: four
instructions of 32 threads a clock and multiprocessor, half as many of integers, a quarter of loads and look-ups. Nothing here
waits for anything, so what a GPU reaches is less.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())

from frame import arguments
from test_triton import instructions

from fracbit.kernels.gpu import prepare
from fracbit.kernels.triton_linear import constants_of
from fracbit.numerics import quantize_tensor, stored_bits
from fracbit.records.scheme import Scheme

BYTES, CLOCK, MULTIPROCESSORS = 3.35e12, 1.755e9, 132  # an H100 SXM's memory a second, and its cores
THREADS = 64
INTEGERS = {
    "LOP3", "SHF", "IADD3", "PRMT", "LEA", "VIADD", "ISETP", "SEL", "MOV", "SGXT", "VIADDMNMX", "PLOP3",
}  # fmt: skip
CASES = (
    *((Scheme("int", 4, 64), rows) for rows in (1, 2, 4, 16)),
    *((Scheme(dtype, 4, 64), 1) for dtype in ("nf", "kmeans", "kmeans:row")),
    *((Scheme(dtype, 4, 64, "out"), 1) for dtype in ("int", "nf", "kmeans")),
    (Scheme("int", 4, 64, "in", "zero"), 1), (Scheme("int", 3, 64), 1), (Scheme("int", 2, 64), 1), (Scheme("nf", 4, 20), 1),
)  # fmt: skip


def share(instructions_a_weight: float, rate: int, bits: float) -> float:
    """Of the bandwidth, where `rate` threads' instructions start a clock and multiprocessor."""
    return bits / 8 * rate / instructions_a_weight * MULTIPROCESSORS * CLOCK / BYTES


def line_of(scheme: Scheme, rows: int) -> str:
    packed = quantize_tensor(torch.randn(64, 4096), scheme)
    bits = stored_bits(packed) / (64 * 4096)
    tiles = constants_of(prepare(packed, "float"), torch.empty(rows, 4096, dtype=torch.bfloat16), dot=False)
    code, loop = ([line for line in part if counts(line)] for part in instructions(scheme, rows))
    kinds = Counter(kind_of(line) for line in loop)
    weights = tiles["TILE_O"] * tiles["TILE_U"] * 8 // THREADS
    repeats = -(-rows // tiles["TILE_N"])  # a tile of rows after another reads the weight again
    text = f"{scheme!s:14} {rows:2} rows, loop {repeats * len(loop) / weights:5.2f}"
    for inputs in (4096, 8192):
        turns = inputs // (8 * tiles["TILE_U"])
        whole = (len(code) - len(loop) + turns * len(loop)) / (turns * weights) * repeats
        text += f"; {inputs}: {whole:5.2f} ({share(whole, 128, bits):.0%})"
    integers = sum(number for kind, number in kinds.items() if kind in INTEGERS) * repeats / weights
    loads = (kinds["LDG"] + kinds["LDS"]) * repeats / weights
    return text + f"; integers {share(integers, 64, bits):.0%}, loads {share(loads, 32, bits):.0%}"


def counts(line: str) -> bool:
    """Neither a mark nor padding."""
    return line.endswith(";") and kind_of(line) != "NOP"


def kind_of(line: str) -> str:
    return re.split(r"[. ;]", re.sub(r"^@!?U?P\w+ ", "", line))[0]


def main() -> None:
    arguments(__doc__).parse_args()
    for scheme, rows in CASES:
        print(line_of(scheme, rows), flush=True)


if __name__ == "__main__":
    main()
