"""What a checkpoint holds, from headers, config and manifest; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fracbit.checkpoint.folder import MANIFEST
from fracbit.checkpoint.format import StoredLayer, own_quantization, read_layers, tensor_name
from fracbit.checkpoint.opened import open_checkpoint
from fracbit.checkpoint.read_manifest import manifest_of
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo
from fracbit.errors import FormatError, blamed_on
from fracbit.numerics.packed import part_shapes

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def summarize(model: str) -> dict[str, Any]:
    """Bits and bytes of every matrix and of the whole; `relative_error` from the manifest, None without one.

    Of a file that other programs run (GPTQ, AWQ, compressed-tensors, MLX, GGUF, ...) the layers are those that it stores in
    codes, and `format` says which it is; for fracbit's own and float checkpoints that is "".
    `share_of_blocks` and `share_of_parameters`, 0..1: of the weights of the blocks' matrices and of all that are quantized.
    Raises `SourceError` or `FormatError`, the latter also when a tensor does not have the size that its scheme needs.
    """
    # The quantized layers, then what is left of the files.
    source = open_checkpoint(model, afar=True)
    quantization = own_quantization(source.config)
    stored = {} if quantization is None else read_layers(quantization)
    errors = _errors(source)
    if source.decodings:
        return _of_codes(model, source, errors)
    layers = {name: _quantized(source, name, layer, errors.get(name)) for name, layer in stored.items()}
    parts = {
        tensor_name(name, part)
        for name, layer in stored.items()
        for part in part_shapes(layer.scheme, layer.shape, layer.outliers)
    }
    rest = {name: info for name, info in source.tensors.items() if name not in parts}
    layers |= {
        name.removesuffix(".weight"): _float(info.dtype, info.shape, info.bytes)
        for name, info in rest.items()
        if len(info.shape) >= 2
    }
    weights = sum(layer.shape[0] * layer.shape[1] for layer in stored.values())
    parameters = weights + sum(torch.Size(info.shape).numel() for info in rest.values())
    return {
        "model": model,
        "format": "",
        "bits_per_weight": 8 * sum(layer.bytes for layer in stored.values()) / weights if weights else None,
        "bits_per_parameter": 8 * source.bytes / max(parameters, 1),
        "bytes": source.bytes,
        "share_of_blocks": _share_of_blocks({name: layer.shape for name, layer in stored.items()}, rest),
        "share_of_parameters": weights / max(parameters, 1),
        "layers": layers,
    }


def _of_codes(model: str, source: Source, errors: Mapping[str, float]) -> dict[str, Any]:
    """The same of a source in another format, whose tensors count as they lie on the disk."""
    disk = source.on_disk
    bytes_of = {
        name: sum(disk[part.name].bytes for part in decoding.parts.values())
        for name, decoding in source.decodings.items()
    }
    coded = {
        name.removesuffix(".weight"): decoding
        for name, decoding in source.decodings.items()
        if any(disk[part.name].dtype not in FLOATS for part in decoding.parts.values())
    }
    layers = {
        name: _stored(
            decoding.scheme or source.decoded, decoding.info.shape, bytes_of[full], errors.get(name)
        )
        for full, decoding in source.decodings.items()
        if (name := full.removesuffix(".weight")) in coded
    }
    shapes = {name: tuple(decoding.info.shape) for name, decoding in coded.items()}
    rest = {name: info for name, info in source.tensors.items() if name.removesuffix(".weight") not in coded}
    layers |= {
        name.removesuffix(".weight"): _float(info.dtype, info.shape, info.bytes)
        for name, info in rest.items()
        if len(info.shape) >= 2
    }
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    parameters = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
    whole = sum(info.bytes for name, info in disk.items() if not _is_view(name, disk))
    packed = sum(layers[name]["bytes"] for name in coded)
    return {
        "model": model,
        "format": source.decoded,
        "bits_per_weight": 8 * packed / weights if weights else None,
        "bits_per_parameter": 8 * whole / max(parameters, 1),
        "bytes": whole,
        "share_of_blocks": _share_of_blocks(shapes, rest),
        "share_of_parameters": weights / max(parameters, 1),
        "layers": layers,
    }


def _is_view(name: str, disk: Mapping[str, TensorInfo]) -> bool:
    """Whether a name stands for a part of a stored tensor, such as one expert of many."""
    whole = name.partition("[")[0]
    return whole != name and whole in disk


def _share_of_blocks(stored: Mapping[str, Sequence[int]], rest: Mapping[str, TensorInfo]) -> float:
    """Of the weights in matrices of the stacks in which layers are quantized."""
    stacks = {match[1].rpartition(".")[0] for match in map(_BLOCK.match, stored) if match}

    def inside(name: str) -> bool:
        match = _BLOCK.match(name)
        return match is not None and match[1].rpartition(".")[0] in stacks

    small = sum(torch.Size(shape).numel() for name, shape in stored.items() if inside(name))
    floats = sum(
        torch.Size(info.shape).numel() for name, info in rest.items() if len(info.shape) > 1 and inside(name)
    )
    return small / max(small + floats, 1)


def loss_table(model: str) -> tuple[list[str], list[list[str]]]:
    """The loss of every block, from the manifest: columns (kinds of linears, and the gain of tweaking) and rows.

    A loss is the quantizer's own, relative to that of zero weights; linears of one name (experts) show their mean.
    `out` after a loss: blocks run along the output. There are no rows without a manifest.
    """
    manifest = {"layers": {}, **manifest_of(open_checkpoint(model))}
    with blamed_on(f"the {MANIFEST} of {model} cannot be read", FormatError, parsing=True):
        return _loss_rows(manifest)


def _loss_rows(manifest: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    losses: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, facts in manifest["layers"].items():
        found = _BLOCK.match(name)
        if found and "loss" in facts:
            kind = name.rpartition(".")[2]
            losses.setdefault(found[1], {}).setdefault(kind, []).append(facts)
    kinds = list(dict.fromkeys(kind for row in losses.values() for kind in row))
    tweaks = {row["block"]: row for row in manifest.get("tweaks", ())}
    rows = [[block, *(_loss(row.get(kind, ())) for kind in kinds)] for block, row in losses.items()]
    if tweaks:
        rows = [[*row, _tweak(tweaks.get(int(row[0].rpartition(".")[2])))] for row in rows]
    return ["block", *kinds, *(["output error, corrected"] if tweaks else [])], rows


def _loss(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return "float"
    out = any((layer["scheme"] or {}).get("axis") == "out" for layer in layers)
    return f"{sum(layer['loss'] for layer in layers) / len(layers):.2e}{' out' if out else ''}"


def _tweak(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['before']:.4f} to {row['after']:.4f} ({row['kept']})"


def _quantized(source: Source, name: str, layer: StoredLayer, error: float | None) -> dict[str, Any]:
    for part, (_, size) in part_shapes(layer.scheme, layer.shape, layer.outliers).items():
        info = source.tensors.get(tensor_name(name, part))
        expected = (torch.Size(size).numel(),) if part == "codes" else tuple(size)
        if info is None or info.shape != expected:
            got = "nothing" if info is None else str(info.shape)
            raise FormatError(
                f"layer {name}: {tensor_name(name, part)} should have shape {expected}, found {got}"
            )
    return {
        "scheme": str(layer.scheme),
        "shape": list(layer.shape),
        "bits_per_weight": layer.bits_per_weight,
        "bytes": layer.bytes,
        "relative_error": error,
        "outliers": layer.outliers,
        "inputs": None if layer.inputs is None else str(layer.inputs),
        "rotated": layer.rotated,
    }


def _float(dtype: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    return _stored(dtype.lower(), shape, size, None)


def _stored(scheme: str, shape: tuple[int, ...], size: int, error: float | None) -> dict[str, Any]:
    return {
        "scheme": scheme,
        "shape": list(shape),
        "bits_per_weight": 8 * size / max(torch.Size(shape).numel(), 1),
        "bytes": size,
        "relative_error": error,
        "outliers": 0,
        "inputs": None,
        "rotated": False,
    }


def _errors(source: Source) -> dict[str, float]:
    """The relative errors of layers; none of layers that an export rounded again, whose error nobody measured."""
    manifest = manifest_of(source)
    again = manifest.get("requantized", {})
    with blamed_on(f"the {MANIFEST} of {source.name} cannot be read", FormatError, parsing=True):
        layers = manifest["layers"] if manifest else {}
        return {
            name: float(layer["loss"])
            for name, layer in layers.items()
            if "loss" in layer and name not in again
        }
