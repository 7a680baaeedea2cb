"""`fracbit demo`: quantizes the bundled model with several schemes and measures each. `make demo` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.show import bytes_text, print_json, print_table, progress
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme

SCHEMES = {
    "int8-64": Scheme("int", 8, 64),
    "nf4-64": Scheme("nf", 4, 64),
    "int4-64": Scheme("int", 4, 64, offset="zero"),
    "e2m1-64": Scheme("float:e2m1", 4, 64),
    "kmeans4-64": Scheme("kmeans", 4, 64),
    "int3-64": Scheme("int", 3, 64, offset="zero"),
    "int3-64-out": Scheme("int", 3, 64, axis="out", offset="zero"),
    "int2-64": Scheme("int", 2, 64, offset="zero"),
}

TEXT = "bundled:held-out?keep=49152"


def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the checkpoints.", rich_help_panel=options.WRITE),
    ] = Path("demo-output"),
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize and evaluate the bundled model: bits, size, perplexity on held-out modules, tokens per second."""
    from fracbit.bundled import bundled_model

    source = str(bundled_model())
    rows: list[dict[str, Any]] = []
    with progress(json or quiet) as show:
        rows.append(_measure("float", source, show, 0))
        for number, (name, scheme) in enumerate(SCHEMES.items(), 1):
            rows.append(
                _quantize(name, source, scheme=scheme, folder=output / name, show=show, number=number)
            )
    protocol = rows[0]["protocol"]
    if json:
        print_json({"rows": rows, "protocol": protocol, "output": str(output)})
        return
    usual = rows[-1]["step"]
    columns = ["scheme", "bits/weight", "file", "perplexity", "tokens/s"]
    print_table(
        columns,
        [_row(row, usual) for row in rows],
        title="The bundled model on standard library modules it never saw",
    )
    print(f"protocol: {protocol}")
    for row in rows:
        if row["step"] != usual:
            why = f"it decodes in another way ({row['step']}), which has nothing to do with bits"
            print(f"tokens/s of {row['scheme']} is left out: {why}")
    print(
        f"checkpoints: {output}/; try: fracbit generate {output / 'nf4-64'} 'def main(' --max-new-tokens 64 --temperature 0.6"
    )


def _quantize(
    name: str, source: str, scheme: Scheme, folder: Path, show: Progress | None, number: int
) -> dict[str, Any]:
    result = fracbit.quantize(source, folder, scheme, overwrite=True, progress=None)
    return _measure(name, str(folder), show, number) | {"bits_per_weight": result.bits_per_weight}


def _measure(name: str, folder: str, show: Progress | None, number: int) -> dict[str, Any]:
    from fracbit.checkpoint.load import load, load_tokenizer
    from fracbit.checkpoint.source import open_source
    from fracbit.pipeline.serve.speed import speed_of
    from fracbit.pipeline.verbs import read_text

    model, tokenizer = load(folder), load_tokenizer(folder)
    total = len(SCHEMES) + 1

    def step(what: str, done: int, windows: int) -> None:
        if show is not None:
            show(f"{name}: {what}", number * windows + done, total * windows)

    found = fracbit.evaluate(model, TEXT, tokenizer, window=512, progress=step)
    speed, _, how = speed_of(model, read_text(TEXT, tokenizer, model).stream[:32], 32)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    source = open_source(folder)
    return {
        "scheme": name,
        "bits_per_weight": 8 * source.bytes / sum(_count(info.shape) for info in source.tensors.values()),
        "bytes": size,
        "perplexity": found.perplexity,
        "tokens_per_second": speed.decode,
        "step": how,
        "protocol": str(found.loss and found.loss.protocol),
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _row(row: dict[str, Any], usual: str) -> list[str]:
    """A line of the table; the speed only of what decodes in the `usual` way, so that like stands beside like."""
    return [
        row["scheme"],
        f"{row['bits_per_weight']:.3f}",
        bytes_text(row["bytes"]),
        f"{row['perplexity']:.3f}",
        f"{row['tokens_per_second']:.0f}" if row["step"] == usual else "-",
    ]
