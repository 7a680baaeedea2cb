"""Recipes that must go on giving the same bytes, as tables of a recipe file, and those that made the kept checkpoints."""

from __future__ import annotations

from typing import Any

from golden.models import LENGTH, SAMPLES, TEXT

Table = dict[str, Any]

SCHEMES: tuple[tuple[str, int, int | str, str, str, str], ...] = (
    ("int", 4, 16, "in", "none", "fp16"),
    ("int", 3, 16, "in", "zero", "fp16"),
    ("int", 2, 24, "in", "float", "bf16"),
    ("int", 5, "row", "in", "zero", "fp32"),
    ("int", 4, "tensor", "in", "none", "fp16"),
    ("int", 6, "flat:24", "in", "none", "fp16"),
    ("int", 3, 16, "out", "zero", "fp16"),
    ("int", 7, "row", "out", "float", "fp16"),
    ("int", 8, 32, "in", "none", "int8:64"),
    ("int", 1, 16, "in", "zero", "fp16"),
    ("float", 4, 16, "in", "none", "fp16"),
    ("float:e3m0", 4, 16, "in", "none", "bf16"),
    ("float:e4m3", 8, "row", "in", "none", "fp32"),
    ("nf", 4, 16, "in", "none", "fp16"),
    ("nf", 3, 16, "in", "none", "int8:32"),
    ("nf", 2, 20, "out", "none", "fp16"),
    ("dynamic", 8, "row", "in", "none", "fp16"),
    ("dynamic", 4, 16, "in", "none", "fp16"),
    ("power", 4, 16, "in", "none", "fp16"),
    ("power:1/2", 3, "flat:16", "in", "none", "fp16"),
    ("int", 4, 16, "in", "mean", "fp16"),
    ("power:fit", 4, 16, "in", "none", "fp16"),
    ("quantile", 4, 16, "in", "none", "fp16"),
    ("quantile", 3, "row", "out", "none", "fp16"),
    ("kmeans", 3, 16, "in", "none", "fp16"),
    ("kmeans:row", 3, "row", "in", "none", "fp16"),
    ("kmeans:row", 2, 16, "in", "float", "int8:32"),
    ("kmeans", 1, "tensor", "in", "none", "fp32"),
)
LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")


def scheme(dtype: str, bits: int, block: int | str, axis: str, offset: str, scale: str) -> Table:
    """A scheme as a recipe file writes it."""
    return {"dtype": dtype, "bits": bits, "block": block, "axis": axis, "offset": offset, "scale": scale}


def spread(first: int) -> list[Table]:
    """Overrides that give the fourteen linears of the Llama the schemes from `first` on."""
    names = [f"model.layers.{number}.{name}_proj" for number in (0, 1) for name in LINEARS]
    rows = [scheme(*SCHEMES[(first + place) % len(SCHEMES)]) for place in range(len(names))]
    return [{"layers": name, "scheme": row} for name, row in zip(names, rows, strict=True)]


INT = scheme("int", 3, 16, "in", "zero", "fp16")
NF = scheme("nf", 3, 16, "in", "none", "int8:32")
KMEANS = scheme("kmeans:row", 3, "row", "in", "none", "fp16")
OUT = scheme("int", 3, 16, "out", "none", "fp16")
EIGHT = scheme("int", 8, 32, "in", "none", "fp16")


def calibrated(quantizer: str = "gptq", kind: Table = INT, more: Table | None = None, **plan: Any) -> Table:
    """A recipe that reads the kept text; forward passes in fp32 wherever it runs, and no search, as was the default then."""
    calibration = {"texts": [f"{TEXT}?length={LENGTH}"], "samples": SAMPLES, "length": LENGTH, "batch": 4}
    calibration |= {"dtype": "float32", **plan}
    return {
        "quantizer": quantizer,
        "scheme": kind,
        "calibration": calibration,
        "search": False,
        **(more or {}),
    }


FREE: dict[str, tuple[str, Table]] = {
    "schemes-first": ("llama", {"overrides": spread(0)}),
    "schemes-second": ("llama", {"overrides": spread(14)}),
    "schemes-turned": ("llama", {"overrides": spread(7)}),
    "embeddings": ("llama", {"scheme": NF, "embeddings": EIGHT}),
    "gpt2": ("gpt2", {"scheme": INT, "overrides": [{"layers": "*.h.1.mlp.*", "keep": True}]}),
    "moe": ("moe", {"scheme": NF, "embeddings": OUT, "head": EIGHT}),
}
"""Recipes that read no data. Searches without data are not kept: since 0.2 they minimise fourth powers of errors."""

CALIBRATED: dict[str, tuple[str, Table]] = {
    "rtn": ("llama", calibrated("rtn", chain="float")),
    "gptq": ("llama", calibrated()),
    "gptq-nf": ("llama", calibrated(kind=NF)),
    "gptq-kmeans": ("llama", calibrated(kind=KMEANS)),
    "gptq-out": ("llama", calibrated(kind=OUT)),
    "gptq-search": ("llama", calibrated(more={"search": True})),
    "gptq-nf-search": ("llama", calibrated(kind=NF, more={"search": True})),
    "gptq-head": ("llama", calibrated(more={"embeddings": EIGHT, "head": EIGHT})),
    "gptq-schemes": ("llama", calibrated(more={"overrides": spread(0)})),
    "gptq-schemes-second": ("llama", calibrated(more={"overrides": spread(14)})),
    "descent": ("llama", calibrated("descent")),
    "descent-nf": ("llama", calibrated("descent", NF)),
    "descent-search": ("llama", calibrated("descent", more={"search": True})),
    "outliers": ("llama", calibrated(outliers=0.07)),
    "outliers-rtn": ("llama", calibrated("rtn", outliers=0.07)),
    "outliers-descent": ("llama", calibrated("descent", outliers=0.1)),
    "smooth": ("llama", calibrated("rtn", transforms=["smooth"])),
    "awq": ("llama", calibrated("rtn", transforms=["awq"])),
    "awq-gptq": ("llama", calibrated(transforms=["smooth", "awq"])),
    "rotate": ("llama", calibrated(transforms=["rotate"])),
    "rotate-mlp": ("llama", calibrated(transforms=["rotate-mlp"])),
    "rotate-both-awq": ("llama", calibrated(transforms=["rotate", "rotate-mlp", "awq"], outliers=0.04)),
    "tweak-closed": ("llama", calibrated(tweak="closed")),
    "tweak-auto": ("llama", calibrated(tweak="auto")),
    "tweak-adam": ("llama", calibrated(tweak="adam")),
    "axis-nearest": ("llama", calibrated(axis="nearest")),
    "axis-gptq": ("llama", calibrated(axis="gptq")),
    "axis-predicted": ("llama", calibrated(axis="predicted")),
    "chain-float": ("llama", calibrated(chain="float")),
    "chain-float-tweak": ("llama", calibrated(chain="float", tweak="auto")),
    "sequential": ("llama", calibrated(sequential=True)),
    "inputs-token": ("llama", calibrated(inputs="int8")),
    "inputs-tensor": ("llama", calibrated(inputs="int6/tensor", tweak="closed")),
    "distill": ("llama", calibrated("rtn", distill=1, rate=1e-4)),
    "seed": ("llama", calibrated(more={"seed": 7}, transforms=["rotate"])),
    "gpt2": ("gpt2", calibrated(transforms=["smooth"], tweak="auto")),
    "gpt2-everything": ("gpt2", calibrated(axis="predicted", tweak="closed", outliers=0.07)),
    "moe": ("moe", calibrated(transforms=["awq"])),
    "moe-rotate": ("moe", calibrated("descent", NF, transforms=["rotate"])),
}
"""Recipes that look at the kept text."""

CHECKPOINTS: dict[str, tuple[str, Table]] = {
    "llama-schemes": ("llama", {"overrides": spread(14), "embeddings": EIGHT}),
    "gpt2-tweaked": (
        "gpt2",
        calibrated(
            tweak="closed",
            outliers=0.07,
            inputs="int8/tensor",
            more={"overrides": [{"layers": "*.attn.c_attn", "scheme": OUT}, {"layers": "*.h.1.mlp.c_fc", "scheme": KMEANS}]},
        ),
    ),
    "moe-rotated": (
        "moe",
        calibrated(
            kind=NF, transforms=["rotate-mlp", "awq"], outliers=0.04, inputs="power8/token", more={"head": EIGHT}
        ),
    ),
}  # fmt: skip
"""What made the stored checkpoints: together they hold every feature of format version 1."""
