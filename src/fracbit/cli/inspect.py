"""`fracbit inspect`: what a checkpoint holds, one line per layer, read from its headers and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fracbit.cli import options
from fracbit.cli.names import check_models
from fracbit.cli.show import bytes_text, print_json, print_table


def inspect(
    model: options.AnyModel,
    json: options.Json = False,
) -> None:
    """Show scheme, bits per weight, bytes and relative error of every layer, as MODEL stores it.

    MODEL may also be a file of another program: GPTQ, AWQ, compressed-tensors, MLX, GGUF, ...
    """
    check_models(model)
    from fracbit.checkpoint.summary import summarize

    summary = summarize(model)
    if json:
        print_json(summary)
        return
    rows = [_row(name, layer) for name, layer in summary["layers"].items()]
    print_table(
        ["layer", "shape", "scheme", "bits/weight", "bytes", "relative error"],
        rows,
        title=Path(model).name + (f" ({summary['format']})" if summary["format"] else ""),
    )
    weights = summary["bits_per_weight"]
    print(
        f"{'not quantized' if weights is None else f'{weights:.4f} bits per weight'}, "
        f"{summary['bits_per_parameter']:.4f} bits per parameter, {bytes_text(summary['bytes'])} in tensors; "
        f"quantized: {summary['share_of_blocks']:.1%} of the weights in the blocks' matrices, "
        f"{summary['share_of_parameters']:.1%} of all parameters"
    )


def _row(name: str, layer: dict[str, Any]) -> list[str]:
    error = "" if layer["relative_error"] is None else f"{layer['relative_error']:.3e}"
    shape = " x ".join(str(size) for size in layer["shape"])
    extra = [layer["inputs"] or "", "rotated" if layer["rotated"] else ""]
    extra += [f"{layer['outliers']} columns in 16 bits"] if layer["outliers"] else []
    scheme = ", ".join(filter(None, [layer["scheme"], *extra]))
    return [name, shape, scheme, f"{layer['bits_per_weight']:.4f}", f"{layer['bytes']:,}", error]
