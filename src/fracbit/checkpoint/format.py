"""The saved format: what `quantization_config` in config.json says, and the names of tensors in the files.

docs/format.md is its specification. A layer is found by its module name. The config holds everything that is needed to
read its tensors (scheme, shape, number of 16-bit columns), and the tables of the fixed data types. So another reader
needs none of our formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from fracbit.errors import FormatError, SchemeError, blamed_on
from fracbit.numerics.datatypes import fixed_type, is_fitted
from fracbit.numerics.packed import PackedTensor, from_parts, part_shapes, parts_of
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme
from fracbit.records.version import __version__

FORMAT_VERSION = 1
QUANT_METHOD = "fracbit"
ROTATION = "hadamard"
SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 2**31 - 1  # rows or columns of a layer
T = TypeVar("T")


@dataclass(frozen=True)
class StoredLayer:
    """How a layer is stored: scheme, shape `[out, in]`, number of 16-bit columns and their type, kind of module.

    `inputs`: how its activations are rounded. `rotated`: whether they are multiplied by `hadamard(in)` before that.
    """

    scheme: Scheme
    shape: tuple[int, int]
    outliers: int = 0
    outlier_dtype: str = "bf16"
    kind: Literal["linear", "embedding"] = "linear"
    inputs: Inputs | None = None
    rotated: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the layer's weight."""
        sizes = part_shapes(self.scheme, self.shape, self.outliers).values()
        return sum(torch.Size(size).numel() * dtypes[0].itemsize for dtypes, size in sizes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight in the file, scales, tables and outliers included."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


def stored_layer(packed: PackedTensor, kind: Literal["linear", "embedding"] = "linear") -> StoredLayer:
    """How a packed weight is stored."""
    count = 0 if packed.columns is None else len(packed.columns)
    half = packed.outliers is not None and packed.outliers.dtype == torch.float16
    sixteen = "fp16" if half else "bf16"
    return StoredLayer(packed.scheme, packed.shape, outliers=count, outlier_dtype=sixteen, kind=kind)


def tensor_names(layer: str, packed: PackedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their names in a file; codes are flat and called `<layer>.weight`."""
    tensors = {}
    for part, tensor in parts_of(packed):
        tensors[tensor_name(layer, part)] = tensor.reshape(-1) if part == "codes" else tensor
    return tensors


def tensor_name(layer: str, part: str) -> str:
    """The name in a file of one part of a layer."""
    return f"{layer}.weight" if part == "codes" else f"{layer}.weight_{part}"


def packed_layer(layer: str, stored: StoredLayer, tensors: Mapping[str, torch.Tensor]) -> PackedTensor:
    """A layer's packed weight from its tensors in a file. Raises `FormatError` naming the layer."""
    shapes = part_shapes(stored.scheme, stored.shape, stored.outliers)
    missing = [tensor_name(layer, part) for part in shapes if tensor_name(layer, part) not in tensors]
    if missing:
        raise FormatError(f"layer {layer}: the checkpoint holds no tensor {missing[0]!r}")
    parts = {part: tensors[tensor_name(layer, part)] for part in shapes}
    if parts["codes"].numel() == torch.Size(shapes["codes"][1]).numel():
        parts["codes"] = parts["codes"].view(shapes["codes"][1])  # [out, bytes of a row]
    try:
        return from_parts(stored.scheme, stored.shape, parts)
    except FormatError as error:
        raise FormatError(f"layer {layer}: {error}") from error


def quantization_config(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """The JSON object that goes into config.json as `quantization_config`."""
    schemes = list(dict.fromkeys(layer.scheme for layer in layers.values()))
    entries = {name: _entry(layer, schemes.index(layer.scheme)) for name, layer in layers.items()}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "fracbit_version": __version__,
        "schemes": [scheme.to_json() for scheme in schemes],
        "tables": _tables(schemes),
        "layers": entries,
    }


def own_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a fracbit checkpoint in its config.json; None for any other model."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD else None


def read_layers(config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """The layers of a `quantization_config`. Raises `FormatError` for another version or a broken entry."""
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"format version {version!r}: this fracbit reads version {FORMAT_VERSION}; update fracbit"
        )
    schemes, layers = config.get("schemes"), config.get("layers")
    if not isinstance(schemes, list) or not isinstance(layers, dict):
        raise FormatError(
            f"quantization_config has schemes = {schemes!s:.40} and layers = {layers!s:.40}, expected a list and an object"
        )
    read = [_read(f"schemes, number {number}", Scheme.from_json, each) for number, each in enumerate(schemes)]
    return {
        name: _read(f"layer {name}", lambda entry: _layer(entry, read), each) for name, each in layers.items()
    }


def _read(where: str, make: Callable[[Any], T], value: Any) -> T:
    """What `make` makes of a value at a place of the config. Raises `FormatError` naming the place."""
    what = f"quantization_config: {where} is {value!s:.80}, which cannot be read"
    try:
        with blamed_on(what, FormatError, parsing=True):
            return make(value)
    except (SchemeError, FormatError) as error:
        raise FormatError(f"{what}: {error}") from error


def _entry(layer: StoredLayer, scheme: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"scheme": scheme, "shape": list(layer.shape)}
    if layer.outliers:
        entry |= {"outliers": layer.outliers, "outlier_dtype": layer.outlier_dtype}
    if layer.kind != "linear":
        entry["kind"] = layer.kind
    if layer.inputs is not None:
        entry["inputs"] = layer.inputs.to_json()
    if layer.rotated:
        entry["rotation"] = ROTATION
    return entry


def _layer(entry: Mapping[str, Any], schemes: list[Scheme]) -> StoredLayer:
    out, inputs = (_count(size, "shape", 1) for size in entry["shape"])
    scheme = schemes[_count(entry["scheme"], "scheme", 0)]
    kind = entry.get("kind", "linear")
    if kind not in ("linear", "embedding"):
        raise FormatError(f"a layer is linear or embedding, got {kind!r}")
    rounding = Inputs.from_json(entry["inputs"]) if "inputs" in entry else None
    outliers, sixteen = _count(entry.get("outliers", 0), "outliers", 0), entry.get("outlier_dtype", "bf16")
    if sixteen not in SIXTEEN or outliers > inputs:
        raise FormatError(
            f"{outliers} of {inputs} columns are in {sixteen!r}; {' or '.join(SIXTEEN)} are known"
        )
    rotation = entry.get("rotation")
    if rotation not in (None, ROTATION):
        raise FormatError(
            f"inputs are rotated by {ROTATION!r} or not at all, got {rotation!r}; update fracbit"
        )
    return StoredLayer(
        scheme,
        shape=(out, inputs),
        outliers=outliers,
        outlier_dtype=sixteen,
        kind=kind,
        inputs=rounding,
        rotated=rotation is not None,
    )


def _count(value: object, what: str, least: int) -> int:
    """A whole number of an entry. Raises `FormatError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise FormatError(f"{what} is {value!r}, expected a whole number from {least} to {LARGEST}")
    return value


def _tables(schemes: list[Scheme]) -> dict[str, list[float]]:
    """The values of every fixed data type in use, by `table_key`."""
    everything = [*schemes, *(scheme.scale for scheme in schemes if isinstance(scheme.scale, Scheme))]
    fixed = [scheme for scheme in everything if not is_fitted(scheme)]
    return {table_key(scheme): fixed_type(scheme).values[0].tolist() for scheme in fixed}


def table_key(scheme: Scheme) -> str:
    """Name of a fixed table in the config: type, bits, and whether it has all 2^bits values (with an offset)."""
    return f"{scheme.dtype}/{scheme.bits}{'/full' if scheme.offset in ('zero', 'float') else ''}"
