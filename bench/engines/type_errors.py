"""How far weights move when they are rounded to the types of engines: relative error, plain and searched ranges
(bench/results/type_errors.json, docs/engines.md).

    python bench/engines/type_errors.py [--models bundled FOLDER ...] [--json FILE]

The error is |Q - W| / |W| over all linears of the blocks. Without models: Gaussian weights whose rows have sizes of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import RESULTS, Row, arguments, machine, say_machine, table, write_json

TYPES = {
    "Q2_K": "int:step2f/16 s=int:up4:16", "Q3_K": "int:step3/16 s=int:step6:16", "MXFP4": "ocp4/32 s=e8m0",
    "IQ4_XS": "iq4/32 s=int:step6:8", "Q4_0": "int:step4/32", "IQ4_NL": "iq4/32", "Q4_K": "int:step4f/32 s=int:up6:8",
    "NVFP4": "ocp4/16 s=ocp8:tensor", "int4, block 16, scales of NVFP4": "int:step4/16 s=ocp8:tensor", "Q4_1": "int:step4f/32",
    "Q5_0": "int:step5/32", "Q5_K": "int:step5f/32 s=int:up6:8", "Q5_1": "int:step5f/32", "Q6_K": "int:step6/16 s=int:step8:16",
    "MXFP8": "ocp8/32 s=e8m0", "FP8 by rows": "ocp8/row s=bf16", "Q8_0": "int:step8/32",
    "int4, symmetric, 15 values": "int4/32", "int3, symmetric, 7 values": "int3/32",
    "int3, all 8 values, signed scales": "int:step3/32",
}  # fmt: skip


def weights_of(model: str) -> list[torch.Tensor]:
    """The linears of a model's blocks, or Gaussian weights."""
    random = torch.Generator().manual_seed(0)
    if model == "gaussian":
        sizes = torch.rand(1024, 1, generator=random)
        return [torch.randn(1024, 1024, generator=random) * sizes]
    from fracbit.checkpoint.opened import open_float
    from fracbit.pipeline.study.weights import weights_on_disk

    found = weights_on_disk(open_float(model))
    return [found.read(name) for name in found.layers]


def main() -> None:
    from fracbit.numerics import decode, quantize_tensor, stored_bits
    from fracbit.records.scheme import parse_scheme

    parser = arguments(__doc__, json=RESULTS / "type_errors.json")
    parser.add_argument("--models", nargs="+", default=["gaussian"])
    given = parser.parse_args()
    rows: list[Row] = []
    for model in given.models:
        weights = weights_of(model)
        power = sum(float(weight.double().square().sum()) for weight in weights)
        for name, scheme in TYPES.items():
            row: Row = {"model": Path(model).name, "type": name, "scheme": scheme}
            for search in (False, True):
                packed = [quantize_tensor(weight, parse_scheme(scheme), search=search) for weight in weights]
                lost = sum(
                    float((decode(q) - w).double().square().sum())
                    for q, w in zip(packed, weights, strict=True)
                )
                row["searched" if search else "plain"] = (lost / power) ** 0.5
                row["bits"] = sum(map(stored_bits, packed)) / sum(weight.numel() for weight in weights)
            rows.append(row)
    say_machine()
    table(
        "model | type | bits | plain | searched",
        ([row["model"], row["type"], f"{row['bits']:.3f}", f"{row['plain']:.2%}", f"{row['searched']:.2%}"] for row in rows),
    )  # fmt: skip
    write_json(given.json, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
