"""The formats that are decoded while they are read, and which of them a checkpoint has.

The name in its config decides. Where the config says nothing (a lost or hand-made one), the tensors decide. A config that
speaks of a quantization over plain floats is stale, and a note says so. To add a format, write a file here and one line below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fracbit.checkpoint.formats.decoding import Decoding
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo, read_model_file
from fracbit.errors import SourceError, blamed_on
from fracbit.records.tables import Table

OURS = "fracbit"
KEYS = ("quantization_config", "compression_config", "quantization")
SETTINGS = {
    "gptq": ("quantize_config.json", ".qweight"),
    "awq": ("quant_config.json", ".qweight"),
    "modelopt": ("hf_quant_config.json", "weight_scale"),
}
"""Files beside config.json in which older programs wrote what now stands in it, and endings of their tensors."""
UNREAD = {
    "vptq": (".centroids.weight", "VPTQ, vectors over inputs in another order"),
    "quip": (".Qidxs", "QuIP#, points of a lattice for rotated weights"),
    "exl3": (".trellis", "EXL3, paths through a trellis for rotated weights"),
}
"""Methods that are known and not decoded: an ending of their tensors, and what they store."""
AT_RUN_TIME = ("bitnet",)
"""Methods that also round weights which are stored as floats, while the model runs."""


@dataclass(frozen=True)
class Decoded:
    """What a format found: `title` in words, the decoded tensors by name, and stored ones that are no weights (`unused`).

    - `views`: parts of stored tensors under names of their own, which parts of decodings may be called by.
    - `rounded`: whether values were lost when it was written.
    """

    title: str
    tensors: Mapping[str, Decoding]
    unused: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    views: Mapping[str, TensorInfo] = field(default_factory=dict)
    rounded: bool = True


@dataclass(frozen=True)
class SourceFormat:
    """`seen`: whether the tensors of a file show the format. `decode`: what it finds in a source, by the settings
    of its config.

    These are empty where there are none. It finds nothing in a float model. Raises `SourceError` naming a tensor.
    """

    seen: Callable[[Mapping[str, TensorInfo]], bool]
    decode: Callable[[Source, Mapping[str, Any]], Decoded]


SOURCE_FORMATS: Table[SourceFormat] = Table(
    "format of a quantized source",
    {
        "modelopt": "fracbit.checkpoint.formats.modelopt:MODELOPT",
        "fp8": "fracbit.checkpoint.formats.fp8_block:FP8_BLOCK",
        "compressed-tensors": "fracbit.checkpoint.formats.compressed_tensors:COMPRESSED_TENSORS",
        "gptq": "fracbit.checkpoint.formats.gptq:GPTQ",
        "awq": "fracbit.checkpoint.formats.awq:AWQ",
        "mxfp4": "fracbit.checkpoint.formats.mxfp4:MXFP4",
        "gguf": "fracbit.checkpoint.formats.gguf:GGUF_FILE",
        "bitsandbytes": "fracbit.checkpoint.formats.bitsandbytes:BITSANDBYTES",
        "marlin": "fracbit.checkpoint.formats.marlin:MARLIN",
        "bitnet": "fracbit.checkpoint.formats.bitnet:BITNET",
        "hqq": "fracbit.checkpoint.formats.hqq:HQQ",
        "exl2": "fracbit.checkpoint.formats.exl2:EXL2",
        "aqlm": "fracbit.checkpoint.formats.aqlm:AQLM",
        "torchao": "fracbit.checkpoint.formats.torchao:TORCHAO",
        "mlx": "fracbit.checkpoint.formats.mlx:MLX_FORMAT",
    },
    SourceError,
)
"""By `quant_method`."""
ALIASES = {"fbgemm_fp8": "fp8", "quark": "modelopt"}
AUTO_ROUND: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round:auto_gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "auto_round:auto_awq": ("awq", {"version": "gemm"}),
}
"""AutoRound writes the formats of others under its own name: by `packing_format`, which one, and what its config leaves out."""


def decoded(source: Source) -> Source:
    """The source with its codes replaced by the floats that they stand for; one of unknown format stays as it is.

    Raises `SourceError` for a known format whose scales or shapes are broken.
    """
    settings = _settings(source)
    method = str(settings.get("quant_method", "")).lower()
    plain = all(info.dtype in FLOATS and info.start is None for info in source.tensors.values())
    if method == OURS or (plain and not settings):
        return source
    name = ALIASES.get(method, method)
    if method in ("auto-round", "intel/auto-round"):
        name, more = AUTO_ROUND.get(str(settings.get("packing_format")), (method, {}))
        settings = {**settings, **more}
    if not method and SOURCE_FORMATS["mlx"].seen(source.tensors):
        name = "mlx"  # whose config names no method
    if name in SOURCE_FORMATS:
        found = _planned(name, source, settings)
        if found.tensors:
            return _applied(source, settings, found)
    seen = [name for name, known in SOURCE_FORMATS.items() if known.seen(source.tensors)]
    if settings:
        stale = not seen and not coded(source) and method not in AT_RUN_TIME
        return _stale(source, settings, method) if stale else source
    if not seen:
        return source
    applied = _applied(source, settings, _planned(seen[0], source, settings))
    if any(info.start is not None for info in source.tensors.values()):
        return applied  # a file whose ending says what it is
    lost = f"its config says nothing of a quantization; the format {seen[0]} was seen in its tensors"
    return replace(applied, notes=(*applied.notes, lost))


def _planned(name: str, source: Source, settings: Mapping[str, Any]) -> Decoded:
    """What a format finds in a source, its parts of types that they can have. Raises `SourceError`."""
    what = f"{source.name} cannot be read as {name}; compare its quantization_config with the released one, or fetch it again"
    with blamed_on(what, SourceError, parsing=True):
        found = SOURCE_FORMATS[name].decode(source, settings)
    types = {place: info.dtype for place, info in {**source.on_disk, **found.views}.items()}
    for part in (part for decoding in found.tensors.values() for part in decoding.parts.values()):
        if part.kinds and types[part.name] not in part.kinds:
            raise SourceError(
                f"{source.name}: {part.name} is {types[part.name]}, and {name} has {' or '.join(part.kinds)} there; "
                "fetch it again"
            )
    return found


def coded(source: Source) -> dict[str, str]:
    """The tensors that are no plain floats and may be weights, with their types."""
    return {
        name: info.dtype
        for name, info in source.tensors.items()
        if info.dtype not in FLOATS and (info.dtype.startswith("F") or "weight" in name.rpartition(".")[2])
    }


def unread(source: Source, method: str) -> tuple[str, str] | None:
    """The method of a checkpoint and what it stores, where that is known and not decoded; older ones have no `method`."""
    for name, (ending, stores) in UNREAD.items():
        if method.lower() == name or any(tensor.endswith(ending) for tensor in source.tensors):
            return name, stores
    return None


def known_methods() -> str:
    """The methods that are decoded, for a message."""
    return ", ".join(sorted([*SOURCE_FORMATS, *ALIASES, "auto-round"]))


def _settings(source: Source) -> Mapping[str, Any]:
    """What a config says of its quantization, at its top or in the config of its text model; empty for a float model."""
    places = [source.config, *(part for part in source.config.values() if isinstance(part, dict))]
    for place in places:
        for key in KEYS:
            found = place.get(key)
            if isinstance(found, dict) and found:
                inner = found.get("quantization_config")  # an old compression_config holds another config
                return inner if isinstance(inner, dict) else found
    return _older_settings(source)


def _older_settings(source: Source) -> Mapping[str, Any]:
    """What programs wrote in a file of their own before it had its place in config.json."""
    for method, (file, ending) in SETTINGS.items():
        if (source.folder / file).is_file() and any(name.endswith(ending) for name in source.tensors):
            return {
                "quant_method": method,
                **read_model_file(source.folder / file, "it says how weights are quantized"),
            }
    return {}


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of a quantization."""
    return {
        name: _plain_config(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in KEYS
    }


def _stale(source: Source, settings: Mapping[str, Any], method: str) -> Source:
    note = (
        f"config.json says that the model is quantized ({method or 'no method'}), but all of its weights are plain floats: "
        "they were read as they are"
    )
    return replace(
        source, config=_plain_config(source.config), quantization=settings, notes=(*source.notes, note)
    )


def _applied(source: Source, settings: Mapping[str, Any], found: Decoded) -> Source:
    """A source whose tensors are those that were found, and the plain ones, in file order."""
    parts = {part.name for decoding in found.tensors.values() for part in decoding.parts.values()}
    used = parts | found.unused | {name.partition("[")[0] for name in found.views}
    plain = {name: info for name, info in source.tensors.items() if name not in used}
    twice = sorted(plain.keys() & found.tensors.keys())
    if twice:
        raise SourceError(
            f"{source.name} holds {twice[0]} as a plain tensor and as codes, and only one of them can be meant; remove the "
            "other from the file"
        )
    first: dict[str, list[str]] = {}
    for name, decoding in found.tensors.items():
        first.setdefault(next(iter(decoding.parts.values())).name, []).append(name)
    tensors: dict[str, TensorInfo] = {}
    for name in (*source.tensors, *found.views):
        tensors |= {made: found.tensors[made].info for made in first.get(name, ())}
        tensors |= {name: plain[name]} if name in plain else {}
    note = f"the source was rounded before ({found.title}): what is measured against it does not see that first loss"
    return replace(
        source,
        config=_plain_config(source.config),
        tensors=tensors,
        decodings=found.tensors,
        stored={**source.on_disk, **found.views},
        decoded=found.title,
        quantization=settings,
        notes=(*source.notes, *([note] if found.rounded else []), *found.notes),
    )
