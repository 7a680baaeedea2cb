"""`fracbit quantize`: a model and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fracbit.cli.show import bytes_text, print_json, print_notes, print_table, progress
from fracbit.errors import RecipeError
from fracbit.records.recipe import Recipe, make_recipe, read_toml
from fracbit.records.scheme import parse_scheme


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id of the float model; not needed where the recipe names it."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="Recipe (TOML), or an allocation (JSON) that `fracbit plan -o` wrote; flags override a recipe."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="int, float, nf, dynamic, quantile, power, kmeans; see docs/guide.md.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code, 1 to 8.")] = None,
    block: Annotated[
        str | None, typer.Option(help="Weights per scale: a number, row, tensor or flat:N.")
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="Blocks along in (input channels), out, or auto (per layer).")
    ] = None,
    offset: Annotated[str | None, typer.Option(help="none, zero (zero point), float or mean.")] = None,
    scale: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, or int8:256 for quantized scales.")
    ] = None,
    search: Annotated[
        bool | None, typer.Option("--search/--no-search", help="Search block ranges of least error.")
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="How schemes are filled, such as rtn.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text, ids or `generated`, for quantizers that look at data; repeatable."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples.")] = None,
    length: Annotated[int | None, typer.Option(help="Ids of a calibration sample.")] = None,
    chain: Annotated[
        str | None, typer.Option(help="A block sees the quantized or the float ones before it.")
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(help="Rewrites before quantizing: smooth, awq, rotate, rotate-mlp; repeatable."),
    ] = None,
    outliers: Annotated[
        float | None, typer.Option(help="Share of input columns kept in 16 bits, such as 0.01.")
    ] = None,
    tweak: Annotated[str | None, typer.Option(help="Norm tweaking: none, adam, closed, auto.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(help="Round activations too: int8, int8/tensor, power8/token; needs calibration."),
    ] = None,
    distill: Annotated[
        int | None, typer.Option(help="Epochs of self-distillation after the last block.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="best: what loses least at --average-bits, with --calibration.")
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option(help="Stored bits per quantized weight, any fraction, divided over the layers."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Size of all weight files, such as 1.2GB.")] = None,
    fits: Annotated[str | None, typer.Option(help="Memory of a device, such as 8GB; see --context.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of context that must fit beside the weights.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences at once, with --fits.")] = 1,
    levels: Annotated[
        str | None, typer.Option(help="Schemes a budget chooses from, such as nf4/64,nf2/64.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="Data-free score that divides a budget, or a JSON file of scores or losses.")
    ] = "weight-error",
    solver: Annotated[
        str,
        typer.Option(help="How a budget is divided: exact (least predicted loss) or order (of the score)."),
    ] = "exact",
    granularity: Annotated[str, typer.Option(help="What a budget chooses for: block or linear.")] = "linear",
    fused: Annotated[
        bool, typer.Option("--fused", help="Keep linears that read one input together.")
    ] = False,
    held_out: Annotated[
        str | None, typer.Option(help="Text: the divided budget must beat the best uniform scheme on it.")
    ] = None,
    embeddings: Annotated[str | None, typer.Option(help="Scheme of the embeddings, such as int8:64.")] = None,
    head: Annotated[str | None, typer.Option(help="Scheme of the output head, such as int8:64.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of layer names that stay float; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where blocks are calibrated, one at a time: cpu, cuda, ...")
    ] = "cpu",
    shard_size: Annotated[int, typer.Option(help="Largest weight file in MB; bounds the memory.")] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize MODEL into a folder that transformers loads once fracbit is imported."""
    if recipe is None and model is not None and model.endswith(".toml"):
        recipe, model = Path(model), None
    allocation = recipe if recipe is not None and recipe.suffix == ".json" else None
    recipe = None if allocation else recipe
    scheme = {
        "dtype": dtype,
        "bits": bits,
        "block": _block(block),
        "axis": None if axis == "auto" else axis,
        "offset": offset,
        "scale": scale,
    }
    flags = {
        "model": model,
        "quantizer": quantizer,
        "search": search,
        "seed": seed,
        "revision": revision,
        "trust_remote_code": trust_remote_code or None,
        "embeddings": parse_scheme(embeddings) if embeddings else None,
        "head": parse_scheme(head) if head else None,
    }
    plan = {
        "texts": calibration,
        "samples": samples,
        "length": length,
        "chain": chain,
        "transforms": transform,
        "outliers": outliers,
        "tweak": tweak,
        "distill": distill,
        "inputs": inputs,
        "axis": "gptq" if axis == "auto" else None,
    }
    made = merged_recipe(recipe, flags, scheme, keep or [], plan)
    from fracbit.pipeline.plan.spending import Spending, budgeted, planned

    if output is None:
        raise RecipeError("no output folder; name one with -o OUT")
    if shard_size < 1:
        raise RecipeError(f"--shard-size must be at least 1 (MB), got {shard_size}")
    spending = Spending(
        preset,
        average_bits,
        size,
        fits,
        context,
        levels,
        score,
        held_out,
        granularity,
        fused,
        batch,
        solver,
    )
    with progress(json) as show:
        made, said = planned(made, allocation) if allocation else (made, ())
        made, notes = budgeted(made, spending, show)
        notes = (*said, *notes)
        if made.calibration is not None:
            from fracbit.pipeline.quantize.calibrated import run_calibrated

            result = run_calibrated(made, output, overwrite, resume, show, device=device)
        else:
            if device != "cpu":
                raise RecipeError("--device goes with --calibration: rounding without data runs on the CPU")
            from fracbit.pipeline.quantize.stream import run

            result = run(made, output, overwrite, resume, shard_size << 20, show)
    result = replace(result, notes=(*notes, *result.notes))
    if json:
        print_json(asdict(result))
        return
    print_notes(result.notes)
    if made.calibration is not None:
        from fracbit.checkpoint.summary import loss_table

        print_table(*loss_table(result.output), title="relative loss")
    weights = (
        "nothing quantized"
        if result.bits_per_weight is None
        else f"{result.bits_per_weight:.4f} bits per weight"
    )
    print(
        f"{result.output}: {weights}, {result.bits_per_parameter:.4f} bits per parameter, {bytes_text(result.bytes)} "
        f"(source {bytes_text(result.source_bytes)}), {result.seconds:.1f} s, peak {bytes_text(result.peak_rss_bytes)}"
    )


def merged_recipe(
    path: Path | None,
    flags: dict[str, Any],
    scheme: dict[str, Any],
    keep: list[str],
    calibration: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a file with flags laid over it; a flag that was not given is None."""
    data = read_toml(path) if path else {}
    data |= {name: value for name, value in flags.items() if value is not None}
    given = {name: value for name, value in scheme.items() if value is not None}
    if given:
        data["scheme"] = {**_part(data, "scheme", dict, path), **given}
    plan = {name: value for name, value in (calibration or {}).items() if value not in (None, [])}
    if plan:
        data["calibration"] = {**_part(data, "calibration", dict, path), **plan}
    if keep:
        data["overrides"] = [
            *_part(data, "overrides", list, path),
            *({"layers": pattern, "keep": True} for pattern in keep),
        ]
    if "model" not in data:
        raise RecipeError(
            "no model; name a folder or a hub id, on the command line or as `model` in the recipe"
        )
    return make_recipe(data, path)


def _part(data: dict[str, Any], name: str, kind: type, path: Path | None) -> Any:
    """A table of the recipe that flags are laid over, empty when it has none."""
    found = data.get(name, kind())
    if not isinstance(found, kind):
        written = f"[{name}]" if kind is dict else f"[[{name}]]"
        raise RecipeError(f"{path}: {name} is {found!r}; write it as a table, {written}")
    return found


def _block(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text
