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
# Where the code of a class speaks of the weight of a child or of a linear in a block, whose name is the group.
CHANGED_IN_BLOCKS = r"\b(?:block|layer)\.([\w.]+)\.weight\.\w+_\("  # as RWKV's does, which rescales some
CHANGED_INSIDE = r"\bself\.(\w+)\.weight\.\w+_\("
READ_INSIDE = r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device)\b)"
ASKED_INSIDE = r"\bself\.(\w+)\.weight\.(?:dtype|device)\b"  # its type or device alone


def decode_for_code(model: nn.Module) -> None:
    """Let packed linears whose weight the model's code reads give it decoded; once their values are there."""
    for module in model.modules():
        kind: Any = type(module)
        read = names_in(kind, READ_INSIDE)
        for name in read | names_in(kind, ASKED_INSIDE):
            child = getattr(module, name, None)
            if isinstance(child, QuantLinear):
                child.decodes = "yes" if name in read else "type"


@cache
def names_in(kind: Any, pattern: str) -> frozenset[str]:
    """What a pattern finds in the code of a class."""
    if kind.__module__.startswith("torch."):
        return frozenset()
    try:
        return frozenset(re.findall(pattern, inspect.getsource(kind)))
    except (OSError, TypeError):  # classes without a file
        return frozenset()
