"""What the code of a model does with its linears besides calling them, read from its source: some it changes, some it reads.

Nothing of transformers is imported here: it may still be loading when fracbit registers with it.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

from fracbit.models.quant_linear import QuantLinear

CHANGED = "the model's code changes its weight"


@cache
def changed_in_blocks(kind: Any) -> frozenset[str]:
    """Names inside a block of linears whose weight the code of a model changes, such as RWKV's, which rescales some."""
    return _names_in(kind, r"\b(?:block|layer)\.([\w.]+)\.weight\.\w+_\(")


@cache
def changed_inside(kind: Any) -> frozenset[str]:
    """Names of children whose weight the code of a module changes in place; what only reads it gets it decoded."""
    return _names_in(kind, r"\bself\.(\w+)\.weight\.\w+_\(")


@cache
def _read_inside(kind: Any) -> frozenset[str]:
    """Names of children whose weight the code of a module reads, instead of only calling them."""
    return _names_in(kind, r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device)\b)")


@cache
def _asked_inside(kind: Any) -> frozenset[str]:
    """Names of children whose weight's type or device the code of a module asks for."""
    return _names_in(kind, r"\bself\.(\w+)\.weight\.(?:dtype|device)\b")


def decode_for_code(model: nn.Module) -> None:
    """Let packed linears whose weight the model's code reads give it decoded; once their values are there."""
    for module in model.modules():
        kind: Any = type(module)
        for name in _read_inside(kind) | _asked_inside(kind):
            child = getattr(module, name, None)
            if isinstance(child, QuantLinear):
                child.decodes = "yes" if name in _read_inside(kind) else "type"


def _names_in(kind: Any, pattern: str) -> frozenset[str]:
    """What a pattern finds in the code of a class."""
    if kind.__module__.startswith("torch."):
        return frozenset()
    try:
        return frozenset(re.findall(pattern, inspect.getsource(kind)))
    except (OSError, TypeError):  # classes without a file
        return frozenset()
