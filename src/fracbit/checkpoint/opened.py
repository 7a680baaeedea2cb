"""A float checkpoint, opened once: its files, its config, and the model's skeleton, from which everything else is read.

One that other programs have quantized counts as the floats that its codes stand for (formats/).

Everything that reads a source before its weights (the schedule of a run, a plan, a score) takes an `Opened`, so that no
command opens the files or builds the skeleton twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fracbit.checkpoint.folder import is_unfinished
from fracbit.checkpoint.formats.decoding import Decoding, turned
from fracbit.checkpoint.formats.known import (
    AT_RUN_TIME,
    KEYS,
    OURS,
    SOURCE_FORMATS,
    coded,
    known_methods,
    unread,
)
from fracbit.checkpoint.source import FLOATS, Source, open_source
from fracbit.errors import FormatError, SourceError, blamed_on
from fracbit.models.family import Family
from fracbit.models.find import family_of
from fracbit.models.origin import Origins, origins
from fracbit.models.skeleton import Layer, quantizable, skeleton, towers
from fracbit.records.files import named_path

MOST_LAYERS = 1024
"""A config may count as many, even if its files hold fewer tensors: models that share weights between layers do."""
SEEKING = 10.0  # seconds for the field that is wrong in a config
_COUNTS = re.compile("layer|depth|block|expert")


@dataclass(frozen=True, eq=False)
class Opened:
    """A float checkpoint on disk and the skeleton of its model, whose weights are on the meta device.

    `untied`: the config of the source ties head and embedding table, and the skeleton was built without that.
    """

    source: Source
    model: PreTrainedModel
    family: Family
    trust_remote_code: bool = False
    untied: bool = False

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every layer that can be quantized, embeddings and head included, by full name."""
        return quantizable(self.model, self.family, include_head=True, include_embeddings=True)

    @cached_property
    def linears(self) -> dict[str, Layer]:
        """The linears of the blocks, by full name."""
        return quantizable(self.model, self.family)

    @cached_property
    def towers(self) -> dict[str, Layer]:
        """The linears of towers for images and sound, by full name."""
        return towers(self.model, self.family)

    @property
    def weights(self) -> int:
        """How many weights the linears of the blocks have."""
        return sum(layer.out * layer.width for layer in self.linears.values())

    @cached_property
    def origins(self) -> Origins:
        """Where each tensor of the model lies on disk."""
        return origins(self.model, self.source.tensors)


def open_float(
    model: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    untied: bool = False,
    afar: bool = False,
) -> Opened:
    """Open the float checkpoint in a folder or of a hub id. No weight is read; `afar`: none is fetched before it is read.

    `untied` gives the head a matrix of its own where the config ties it to the embedding table.
    Raises `SourceError` when it cannot be read, is quantized in a way that is not known, or is not a causal language model.
    """
    source = open_source(str(model), revision, trust_remote_code, afar)
    _check_float(source)
    config = model_config(source, trust_remote_code)
    untied = untied and bool(config.tie_word_embeddings)
    if untied:
        config.tie_word_embeddings = False
    return opened_source(source, config, trust_remote_code, untied)


def opened_source(
    source: Source, config: PreTrainedConfig, trust_remote_code: bool = False, untied: bool = False
) -> Opened:
    """A source with the skeleton of its model. Raises `SourceError` where a tensor does not fit the model."""
    with _naming_the_field(source):
        shell = skeleton(config, trust_remote_code=trust_remote_code)
        family = family_of(shell)
    opened = Opened(source, shell, family=family, trust_remote_code=trust_remote_code, untied=untied)
    opened = _with_turned(opened)
    _check_fit(opened)
    return opened


def model_config(source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Transformers' config of a source. Raises `SourceError` for an unknown model, or code that is not trusted."""
    if _unknown(source) and not (trust_remote_code and "auto_map" in source.config):
        if "auto_map" in source.config:
            raise SourceError(
                f"{source.name} runs code of its own; if you trust it, pass --trust-remote-code"
            )
        raise SourceError(
            f"{source.name} is not a model that transformers knows: config.json says model_type = "
            f"{source.config.get('model_type')}; install a newer transformers if it is a newer model"
        )
    _check_depth(source)
    what = f"{source.name}: transformers cannot read its config.json"
    with _naming_the_field(source), blamed_on(what, SourceError):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    assert isinstance(config, PreTrainedConfig)
    if source.quantization or source.decoded:
        _forget_quantization(config)
    return config


def _check_depth(source: Source) -> None:
    """Refuse a config that counts more layers or experts than its files have tensors: each would be built."""
    most = max(MOST_LAYERS, len(source.tensors))
    for place in [source.config, *(part for part in source.config.values() if isinstance(part, dict))]:
        for field, count in place.items():
            if isinstance(count, int) and count > most and _COUNTS.search(field):
                raise SourceError(
                    f"{source.name}: config.json says {field} = {count}, and its files hold {len(source.tensors)} tensors; "
                    "compare it with the config that was released"
                )


@contextmanager
def _naming_the_field(source: Source) -> Iterator[None]:
    """Let an error of a config name the field without which its model could be built, where it is one alone."""
    try:
        yield
    except SourceError as error:
        field = _culprit(source)
        if field is None:
            raise
        raise SourceError(
            f"{source.name}: config.json says {field} = {source.config[field]!s:.60}; compare it with the one that was "
            f"released ({error})"
        ) from error


def _culprit(source: Source) -> str | None:
    """The field of config.json without which, or with 1 for it, the model can be built; None where it is not one alone."""
    if _unknown(source):
        return None
    until = time.monotonic() + SEEKING
    plain = {name: value for name, value in source.config.items() if name not in KEYS}
    for field, value in plain.items():
        rest = {name: each for name, each in plain.items() if name != field}
        for other in [rest, {**rest, field: 1}] if isinstance(value, int) else [rest]:
            if field == "model_type" or time.monotonic() > until:
                continue
            with suppress(SourceError), blamed_on("", SourceError):
                family_of(skeleton(AutoConfig.for_model(**other)))
                return field
    return None


def _forget_quantization(config: PreTrainedConfig) -> None:
    """Take out of a config, and of those of its parts, what it says of a quantization."""
    for key in KEYS:
        config.__dict__.pop(key, None)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _forget_quantization(part)


def _unknown(source: Source) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = source.config.get("model_type")
    return not isinstance(named, str) or named not in CONFIG_MAPPING


def _check_float(source: Source) -> None:
    """Raise `SourceError` where the weights are quantized in a way that is not decoded."""
    quantization = source.config.get("quantization_config") or source.config.get("compression_config")
    asked = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = asked or "unknown method"
    known = unread(source, str(asked or ""))
    if known is not None:
        raise SourceError(
            f"{source.name} is already quantized ({known[0]}: {known[1]}), and its codes mean nothing without the program that "
            f"made them; fracbit decodes {known_methods()}: start from the float model, or from its release in one of these"
        )
    if not quantization:
        check_weight_types(source)
        return
    if method == OURS:
        raise SourceError(
            f"{source.name} is already quantized (fracbit); start from the float model: a second rounding loses more"
        )
    if str(method).lower() in AT_RUN_TIME and not coded(source):
        raise SourceError(
            f"{source.name} is already quantized ({method}), and its model rounds the floats in it while it runs: they are not "
            "the weights that it uses. fracbit decodes the packed form of the same release; start from that, or from a float "
            "model"
        )
    codes = coded(source) if str(method).lower() in SOURCE_FORMATS else {}
    what = "".join(
        f", and {name} in {dtype} is not of that format" for name, dtype in list(codes.items())[:1]
    )
    raise SourceError(
        f"{source.name} is already quantized ({method}){what}; fracbit decodes {known_methods()}: start from the float model"
    )


def check_weight_types(source: Source) -> None:
    """Refuse weights that are 8-bit floats or integers: without their scales they would be read as other numbers.

    For a model whose config says nothing of quantization. Raises `SourceError` naming a tensor.
    """
    codes = coded(source)
    if codes:
        name, dtype = next(iter(codes.items()))
        raise SourceError(
            f"{source.name} holds {len(codes)} weights that are not 16, 32 or 64-bit floats ({name}: {dtype}), and its config "
            "has no quantization_config that says how to decode them; start from the float model, or restore the config"
        )


def _with_turned(opened: Opened) -> Opened:
    """Decoded weights are [out, in]; layers that store theirs as [in, out] (GPT-2's Conv1D) get the transpose."""
    source = opened.source
    turn = {
        place.plain
        for name, layer in opened.layers.items()
        if layer.transposed and (place := opened.origins.tensors.get(f"{name}.weight")) is not None
    }
    made: dict[str, Decoding] = {}
    for name, decoding in source.decodings.items():
        if name in turn and decoding.upright:
            made[name] = turned(decoding, replace(decoding.info, shape=decoding.info.shape[::-1]))
    if not made:
        return opened
    tensors = {**source.tensors, **{name: decoding.info for name, decoding in made.items()}}
    return replace(opened, source=replace(source, tensors=tensors, decodings={**source.decodings, **made}))


def _check_fit(opened: Opened) -> None:
    """Raise `SourceError` for a tensor whose type or shape is not that of a weight of the model."""
    source = opened.source
    wanted: Mapping[str, torch.Tensor] = opened.model.state_dict(keep_vars=True)
    for name, origin in opened.origins.tensors.items():
        weight, infos = wanted[name], [source.tensors[each] for each in origin.names]
        for each, info in zip(origin.names, infos, strict=True):
            if weight.is_floating_point() and info.dtype not in FLOATS:
                raise SourceError(
                    f"{source.name} holds {each} in {info.dtype}, and the model has a float weight there; its config has no "
                    "quantization_config that says how to decode it: start from the float model, or restore the config"
                )
        # A conversion runs transformers' own operations, some of which read values.
        if origin.conversion is not None:
            continue
        found = origin.read([torch.empty(info.shape, device="meta") for info in infos]).shape
        if found != weight.shape:
            how = f"is decoded ({source.decoded}) to" if origin.names[0] in source.decodings else "is"
            raise SourceError(
                f"{source.name}: {origin.names[0]} {how} {list(found)}, and {name} of a {type(opened.model).__name__} is "
                f"{list(weight.shape)}; compare config.json with the released one, or fetch the file again"
            )


def open_checkpoint(
    model: str | Path, trust_remote_code: bool = False, revision: str | None = None, afar: bool = False
) -> Source:
    """The files of a finished checkpoint. Raises `FormatError` for an unfinished one, `SourceError`."""
    check_finished(model)
    return open_source(str(model), revision, trust_remote_code, afar)


def check_finished(model: str | Path) -> None:
    """Raises `FormatError` for the output of a run that did not end."""
    if is_unfinished(named_path(model, SourceError)):
        raise FormatError(
            f"{model} is the unfinished output of `fracbit quantize`; continue it with --resume"
        )
