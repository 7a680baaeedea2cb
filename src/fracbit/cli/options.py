"""The arguments and options that several commands share, and the headings of `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli.names import FLOAT_TYPES
from fracbit.records.tables import SERVING, TRACKERS

WRITE = "What to write"
MEASURE = "What to measure"
SMALL = "How small"
DATA = "With data"
RUN = "Where and how it runs"

FloatModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of the float model, or bundled.")
]
AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id or .gguf file, fracbit or float, or bundled.")
]

Foreign = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder, hub id or GGUF file that another program quantized: GPTQ, AWQ, compressed-tensors, ...",
    ),
]

# What to write
Better = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder, or .gguf file, of the better checkpoint.", rich_help_panel=WRITE
    ),
]
Folder = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write.", rich_help_panel=WRITE)
]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of layer names that stay float; repeatable.", rich_help_panel=WRITE),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=WRITE)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted output.", rich_help_panel=WRITE)
]
ExportRows = Annotated[
    Path | None,
    typer.Option(
        "--export", help="Also write all rows of the store: a .parquet or .csv file.", rich_help_panel=WRITE
    ),
]

Track = Annotated[
    str | None,
    typer.Option(
        metavar="TRACKER[:EXPERIMENT]",
        help=f"Also add rows to an experiment tracker: {', '.join(TRACKERS)}.",
        rich_help_panel=WRITE,
    ),
]

# What to measure
Granularity = Annotated[str, typer.Option(help="block or linear.", rich_help_panel=MEASURE)]
Fused = Annotated[
    bool,
    typer.Option("--fused", help="Keep linears that read one input together.", rich_help_panel=MEASURE),
]
Whole = Annotated[
    bool,
    typer.Option(
        "--whole",
        help="Read all rows of large weights instead of a sample.",
        rich_help_panel=RUN,
    ),
]

# How small
AverageBits = Annotated[
    float | None,
    typer.Option(
        help="Stored bits per quantized weight, any fraction, divided over the layers.", rich_help_panel=SMALL
    ),
]
Size = Annotated[
    str | None, typer.Option(help="Size of all weight files, such as 1.2GB.", rich_help_panel=SMALL)
]
Fits = Annotated[
    str | None,
    typer.Option(
        help="Memory of a device, such as 8GB, for weights, KV cache and activations.", rich_help_panel=SMALL
    ),
]

Levels = Annotated[
    str | None, typer.Option(help="Schemes to choose from, such as nf4/64,nf2/64.", rich_help_panel=SMALL)
]

# With data
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        help=f"Engine that will run the file: {', '.join(SERVING)}. Layers get what it serves, and OUT is its file.",
        rich_help_panel=WRITE,
    ),
]
ScoreText = Annotated[str | None, typer.Option(help="Text for scores that read text.", rich_help_panel=DATA)]
CalibrationTexts = Annotated[
    list[str],
    typer.Option(
        "--calibration",
        help="Text that inputs are observed on, or builtin; options after ?; repeatable.",
        rich_help_panel=DATA,
    ),
]
SampleLength = Annotated[
    int | None,
    typer.Option(
        "--length",
        help="Tokens of a sample; default: 512, at most the model's positions.",
        rich_help_panel=DATA,
    ),
]
Samples = Annotated[int, typer.Option(help="Samples of each text.", min=1, rich_help_panel=DATA)]
Length = Annotated[int, typer.Option(help="Tokens of a sample.", min=2, rich_help_panel=DATA)]
StudySeed = Annotated[
    int, typer.Option("--seed", help="Seed of random orders and of the samples.", rich_help_panel=DATA)
]

# Generating
MaxNew = Annotated[int, typer.Option(help="Maximum number of new tokens.", rich_help_panel=WRITE)]
Temperature = Annotated[
    float,
    typer.Option(
        help="0 takes the most likely token, 1 samples from the model's own distribution.",
        rich_help_panel=WRITE,
    ),
]
SamplingSeed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the sampling.", rich_help_panel=WRITE),
]
KvBits = Annotated[
    int,
    typer.Option(help="Bits of the KV cache: 16 (the model's own type), 8 or 4.", rich_help_panel=RUN),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations", help="float (exact) or int8 (rounded, faster on CPUs).", rich_help_panel=RUN
    ),
]

# Where and how it runs
Dtype = Annotated[
    str,
    typer.Option(help=f"Type of unquantized tensors: {', '.join(FLOAT_TYPES)}.", rich_help_panel=RUN),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...", rich_help_panel=RUN)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=RUN)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting, such as scheme.axis=out, search=true, head=int8/64 or calibration.samples=64; "
        "repeatable. `--set help` lists all.",
        rich_help_panel=RUN,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.", rich_help_panel=RUN)]
