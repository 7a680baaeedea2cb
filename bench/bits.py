"""What every bit buys: perplexity of the bundled model against stored bits per weight, for each data type; a picture and JSON.

    python bench/bits.py [-o docs/pictures/bits.png] [--json bench/results/bits.json]

Round-to-nearest in blocks of 64, fp16 scales, all linears in the blocks; the first 49,152 tokens of the held-out modules. Bits
are counted from stored bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch

from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.evaluation import perplexity
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import decode, quantize_tensor, stored_bits
from fracbit.pipeline.verbs import read_text
from fracbit.records.scheme import Scheme

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TYPES = {
    "int": Scheme("int"),
    "int, zero point": Scheme("int", offset="zero"),
    "float": Scheme("float"),
    "nf": Scheme("nf"),
    "power 1/3": Scheme("power"),
    "quantile": Scheme("quantile"),
    "kmeans": Scheme("kmeans"),
}


def measure() -> dict[str, object]:
    """Perplexity and stored bits of every type at 2 to 8 bits."""
    folder = str(bundled_model())
    model, tokenizer = load(folder, torch.float32), load_tokenizer(folder)
    ids = read_text("bundled:held-out?keep=49152", tokenizer, model).stream
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    }
    assert not any(isinstance(module, QuantLinear) for module in linears.values())
    kept = {name: module.weight.detach().clone() for name, module in linears.items()}
    weights = sum(weight.numel() for weight in kept.values())
    plain = perplexity(model, ids, window=512)
    rows = []
    for name, scheme in TYPES.items():
        for bits in range(2, 9):
            packed = {
                layer: quantize_tensor(weight, scheme.with_bits(bits)) for layer, weight in kept.items()
            }
            for layer, module in linears.items():
                module.weight.data = decode(packed[layer])
            cost = sum(stored_bits(one) for one in packed.values()) / weights
            found = perplexity(model, ids, window=512).perplexity
            rows.append({"type": name, "bits": bits, "bits_per_weight": cost, "perplexity": found})
            print(f"{name:16} {bits} {cost:.3f} {found:.3f}", flush=True)
    return {"float_perplexity": plain.perplexity, "protocol": str(plain.protocol), "rows": rows}


def draw(result: dict[str, object], path: Path) -> None:
    """Perplexity over stored bits, one line a type, on a logarithmic scale."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    rows = result["rows"]
    assert isinstance(rows, list)
    for name in TYPES:
        line = [row for row in rows if row["type"] == name]
        axes.plot(
            [r["bits_per_weight"] for r in line],
            [r["perplexity"] for r in line],
            marker="o",
            ms=3.5,
            label=name,
        )
    axes.axhline(float(str(result["float_perplexity"])), color="0.4", ls="--", lw=1, label="the float model")
    axes.set_yscale("log")
    axes.set_ylim(float(str(result["float_perplexity"])) * 0.93, 120)
    axes.set_yticks([10, 12, 15, 20, 30, 50, 100], ["10", "12", "15", "20", "30", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("stored bits per weight, scales and tables included")
    axes.set_ylabel("perplexity on held-out modules")
    axes.set_title("The bundled model, round-to-nearest, blocks of 64", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write JSON, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures/bits.png"))
    parser.add_argument("--json", type=Path, default=Path("bench/results/bits.json"))
    given = parser.parse_args()
    result = measure()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, given.output)


if __name__ == "__main__":
    main()
