"""Models: families as data, walks over blocks, the packed layers, and the changes that are made to a model.

Names are imported from their files when first used: the packed layers are needed while transformers itself is
still being imported, and the rest needs all of it. `fracbit.models.blocks` and `fracbit.models.skeleton` are
files; each holds a function of the same name.
"""

import importlib
from typing import Any

_HOME = {
    "FAMILIES": "families",
    "Family": "family",
    "Hidden": "walk",
    "Layer": "skeleton",
    "Origin": "origin",
    "QuantEmbedding": "quant_linear",
    "QuantLinear": "quant_linear",
    "TiedHead": "quant_linear",
    "advance": "walk",
    "embed": "walk",
    "family_of": "find",
    "groups": "blocks",
    "head": "walk",
    "linears": "blocks",
    "materialize": "install",
    "norms": "blocks",
    "observe": "walk",
    "origins": "origin",
    "pairs": "blocks",
    "peek": "walk",
    "quantizable": "skeleton",
    "release": "install",
    "set_weight": "install",
    "split_experts": "experts",
    "storage": "spill",
    "weight_of": "blocks",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name of the package when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'fracbit.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fracbit.models.{_HOME[name]}"), name)
