"""Perplexity of the bundled model against stored bits per weight, for each data type; a picture and JSON.
Makes the picture of README.md (docs/pictures/bits.png, bench/results/bits.json).

    python bench/bits.py [-o docs/pictures/bits.png] [--json bench/results/bits.json]

Round-to-nearest in blocks of 64, fp16 scales, all linears in the blocks; the first 49,152 tokens of the held-out modules. Bits
are counted from stored bytes.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from frame import RESULTS, ROOT, Row, arguments, bed, say_machine, write_json
from matplotlib.figure import Figure

import fracbit
from fracbit import Scheme

TYPES = {
    "int": Scheme("int"), "int, zero point": Scheme("int", offset="zero"), "float": Scheme("float"), "nf": Scheme("nf"),
    "power 1/3": Scheme("power"), "quantile": Scheme("quantile"), "kmeans": Scheme("kmeans"),
}  # fmt: skip


def measure(widths: list[int], tokens: int) -> Row:
    """Perplexity and stored bits of every type at every width."""
    judge = partial(fracbit.evaluate, text=f"bundled:held-out?keep={tokens}", window=512, dtype="float32")
    folder = bed("bundled", tokens).folder
    plain, rows = judge(folder), []
    for (name, scheme), bits in product(TYPES.items(), widths):
        with TemporaryDirectory() as made:
            cost = fracbit.quantize(folder, made, scheme.with_bits(bits), overwrite=True).bits_per_weight
            found = judge(made).perplexity
        rows.append({"type": name, "bits": bits, "bits_per_weight": cost, "perplexity": found})
        print(f"{name:16} {bits} {cost:.3f} {found:.3f}", flush=True)
    return {"float_perplexity": plain.perplexity, "protocol": str(plain.loss.protocol), "rows": rows}


def draw(result: Row, path: Path) -> None:
    """Perplexity over stored bits, one line a type, on a logarithmic scale."""
    figure, plain = Figure(figsize=(7.2, 4.2), layout="constrained"), result["float_perplexity"]
    axes = figure.add_subplot()
    for name in TYPES:
        line = [(row["bits_per_weight"], row["perplexity"]) for row in result["rows"] if row["type"] == name]
        axes.plot(*zip(*line, strict=True), marker="o", ms=3.5, label=name)
    axes.axhline(plain, color="0.4", ls="--", lw=1, label="the float model")
    axes.set_yscale("log")
    axes.set_ylim(plain * 0.93, 120)
    ticks = [10, 12, 15, 20, 30, 50, 100]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("stored bits per weight, scales and tables included")
    axes.set_ylabel("perplexity on held-out modules")
    axes.set_title("The bundled model, round-to-nearest, blocks of 64", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = arguments(__doc__, json=RESULTS / "bits.json")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "pictures" / "bits.png")
    parser.add_argument("--widths", nargs="+", type=int, default=list(range(2, 9)))
    parser.add_argument("--tokens", type=int, default=49152, help="of the text")
    given = parser.parse_args()
    say_machine()
    result = measure(given.widths, given.tokens)
    write_json(given.json, result)
    draw(result, given.output)


if __name__ == "__main__":
    main()
