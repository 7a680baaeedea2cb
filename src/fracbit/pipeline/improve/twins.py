"""`Twins`: a checkpoint that another program has quantized, and the float model that it was made of; opened and compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fracbit.checkpoint.opened import Opened, check_finished, open_float
from fracbit.checkpoint.source import Source, fingerprint, open_source, read_tensor
from fracbit.errors import FormatError, SourceError
from fracbit.models.blocks import blocks
from fracbit.models.origin import Origin, block_places
from fracbit.records.files import named_path
from fracbit.records.version import __version__

ALIKE = 0.3  # cosine between a weight and what it was rounded to; even 2 bits keep 0.8, and those of two models have 0


@dataclass(frozen=True, eq=False)
class Twins:
    """`coded`: the quantized checkpoint, whose tensors are decoded while they are read; `floats`: the float model."""

    coded: Opened
    floats: Opened | None = None

    @property
    def layers(self) -> dict[str, str]:
        """The quantized linears of the blocks by full name, each with its decoded tensor; those that hold one tensor alone."""
        found = {}
        for name in self.coded.linears:
            plain = self.coded.origins.tensors[f"{name}.weight"].plain
            decoding = None if plain is None else self.coded.source.decodings.get(plain)
            if plain is not None and decoding is not None and decoding.floats is None:
                found[name] = plain
        return found

    def key(self, *facts: object) -> str:
        """16 hex digits that name a run on these files, with what else decides its result."""
        files = [None if one is None else fingerprint(one.source) for one in (self.coded, self.floats)]
        text = json.dumps([__version__, files, *facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_twins(
    checkpoint: str | Path, against: str | Path | None = None, trust_remote_code: bool = False
) -> Twins:
    """Open both and refuse what does not belong together, from headers and two weights. Raises `SourceError`, `FormatError`."""
    check_finished(checkpoint)
    _check_foreign(
        open_source(str(checkpoint), trust_remote_code=trust_remote_code), named_path(checkpoint, SourceError)
    )
    coded = open_float(checkpoint, trust_remote_code=trust_remote_code)
    if against is None:
        return Twins(coded)
    floats = open_float(against, trust_remote_code=trust_remote_code)
    if floats.source.decodings:
        raise SourceError(
            f"{against} was quantized itself ({floats.source.decoded}); name the float model that {checkpoint} was made of"
        )
    twins = Twins(coded, floats)
    _check_alike(twins)
    return twins


def _check_foreign(source: Source, folder: Path) -> None:
    """Refuse what is no folder of weights that another program has quantized."""
    quantization = source.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fracbit":
        raise FormatError(
            f"{source.name} is a checkpoint of fracbit, which is made better where it is made: fracbit quantize with "
            "--quantizer descent, --set calibration.tweak=auto or --preset best; or name what fracbit export made of it"
        )
    if (folder / "adapter_config.json").is_file():
        raise FormatError(
            f"{source.name} has an adapter beside its weights; merge it into the float model and quantize that"
        )
    if not any(decoding.floats is None for decoding in source.decodings.values()):
        raise SourceError(
            f"{source.name} is not quantized: its weights are plain floats; name a checkpoint of GPTQ, AWQ, "
            "compressed-tensors, GGUF, MLX, ..., or quantize this one with fracbit quantize"
        )


def _check_alike(twins: Twins) -> None:
    """Raise `SourceError` where the models differ: in kind, in the shape of a tensor, or in their weights."""
    coded, floats = twins.coded, twins.floats
    assert floats is not None
    kinds = [str(one.source.config.get("model_type")) for one in (coded, floats)]
    if kinds[0] != kinds[1]:
        raise SourceError(
            f"{coded.source.name} is a {kinds[0]} and {floats.source.name} a {kinds[1]}; {_remedy(twins)}"
        )
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in one.model.state_dict().items()}
        for one in (coded, floats)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        both = [found.get(name) for found in shapes]
        if both[0] != both[1]:
            said = ["none" if shape is None else str(list(shape)) for shape in both]
            raise SourceError(
                f"{name} is {said[0]} in {coded.source.name} and {said[1]} in {floats.source.name}; {_remedy(twins)}"
            )
    missing = floats.origins.missing
    if missing:
        raise SourceError(f"{floats.source.name} lacks {missing[0]}; fetch it again")
    names = list(twins.layers)
    for name in dict.fromkeys([*names[:1], *names[-1:]]):
        one, other = (
            weight_of_layer(opened, name).flatten().float() for opened in (coded, floats)
        )  # [out * in]
        found = torch.nn.functional.cosine_similarity(one, other, dim=0)
        if not float(found) > ALIKE:
            raise SourceError(
                f"{name} of {coded.source.name} is nothing like that of {floats.source.name} (cosine {float(found):.2f}); "
                f"{_remedy(twins)}"
            )


def _remedy(twins: Twins) -> str:
    return f"name the float model that {twins.coded.source.name} was made of"


def weight_of_layer(opened: Opened, name: str) -> Tensor:
    """The weight of a layer, fp32, as its module stores it."""
    return read_at(opened.source, opened.origins.tensors[f"{name}.weight"])


def read_at(source: Source, place: Origin) -> Tensor:
    """The tensor at a place, decoded in fp32."""
    return place.read([_read(source, name) for name in place.names])


def _read(source: Source, name: str) -> Tensor:
    return read_tensor(source, name, torch.float32 if name in source.decodings else None)


def block_tensors(opened: Opened, path: str, source: Source | None = None) -> dict[str, Tensor]:
    """The tensors of a block by their names inside it; `source`: where they are read, with other values perhaps."""
    places = block_places(opened.model, opened.origins, path)
    return {name: read_at(source or opened.source, place) for name, place in places.items()}


def outer_tensors(opened: Opened) -> dict[str, Tensor]:
    """The tensors outside the blocks."""
    paths = tuple(f"{path}." for path, _ in blocks(opened.model, opened.family))
    return {
        name: read_at(opened.source, place)
        for name, place in opened.origins.tensors.items()
        if not name.startswith(paths)
    }
