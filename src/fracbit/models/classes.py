"""Which class of transformers a config stands for: that of the checkpoint itself, so that names and parts stay as they are.

A config such as Qwen3.5's belongs to a text model and to one that also sees images. What the checkpoint holds is told by its
`architectures`; where they say nothing, a causal language model comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from fracbit.errors import SourceError

AutoClass: TypeAlias = Any
"""An auto class of transformers, with `from_config` and `from_pretrained`."""
AUTOS: tuple[AutoClass, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
HEADS = ("CausalLM", "LMHead")
"""Parts of the names that language models have, also those of code that transformers has since renamed."""


def auto_class(config: PreTrainedConfig) -> AutoClass:
    """The class that builds the model of a checkpoint with this config, its own code included: an auto class, or the model's.

    Raises `SourceError` for encoders, classifiers and whatever else writes no text.
    """
    listed: Any = config.architectures or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise SourceError(
            f"config.json says architectures = {listed!s:.60}; it is a list of names of classes, or left out"
        )
    own = getattr(config, "auto_map", None) or {}
    remote = [auto for auto in AUTOS if auto.__name__ in own]
    known = {auto: names for auto in AUTOS if (names := list(_names(auto, config)))}
    named = [getattr(transformers, name, None) for name in listed]
    if not known and not remote and named and getattr(named[0], "config_class", None) is type(config):
        return named[0]  # the text model of a pair, which no auto class builds from its own config
    if not known and not remote:
        raise SourceError(
            f"no causal language model can be built from a config of type {config.model_type!r}; use a decoder-only model that "
            "AutoModelForCausalLM or AutoModelForImageTextToText knows (its own code needs trust_remote_code)"
        )
    exact = [auto for auto, names in known.items() if not listed or set(names) & set(listed)]
    if exact:
        return exact[0]
    # A base model has no head of its own: GPT-2's files are one.
    if any(name.endswith("Model") or any(head in name for head in HEADS) for name in listed):
        return [*remote, *known][0]
    wanted = [name for names in known.values() for name in names]
    instead = f"; name one, such as a {wanted[0]}" if wanted else ""
    raise SourceError(
        f"the checkpoint holds a {' or '.join(listed)}, which is not a causal language model{instead}"
    )


def from_config(auto: AutoClass, config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """An untrained model of a class that `auto_class` found. Raises as transformers does."""
    if auto in AUTOS:
        model: PreTrainedModel = auto.from_config(config, **how)
        return model
    how.pop("trust_remote_code", None)
    return auto._from_config(config, **how)  # type: ignore[no-any-return]


def _names(auto: AutoClass, config: PreTrainedConfig) -> Iterator[str]:
    """The classes that an auto class may build from a config, by name."""
    if type(config) not in auto._model_mapping:
        return
    found = auto._model_mapping[type(config)]
    for one in found if isinstance(found, (tuple, list)) else (found,):
        yield one.__name__
