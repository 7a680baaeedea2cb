"""The model card of a quantized checkpoint: what it is, how to load it, and the table of what was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fracbit.checkpoint.format import StoredLayer

_HEAD = """---
library_name: transformers
base_model: {source}
tags: [fracbit, quantized]
---

# {title}, {bits:.2f} bits per weight

Quantized from `{source}` by fracbit. It loads with transformers once fracbit is imported:

```python
import fracbit
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this card, or its id on the hub
```

Without `import fracbit` transformers stops with a size mismatch: the layers are packed.

| measured | value |
|---|---|
| stored bits per quantized weight, scales and tables included | {bits:.4f} |
| stored bits per parameter, embeddings and head included | {parameter_bits:.4f} |
| size of the weight files | {size:,} bytes |
| size of the source's tensors | {source_size:,} bytes |

| layers | scheme | number | bits per weight | relative squared error |
|---|---|---|---|---|
{rows}
fracbit.json beside this card has the recipe, the hashes and the decision for every layer.
"""


@dataclass(frozen=True)
class Facts:
    """The facts of a card: the source's name, the model class, totals of the run, layers, and their losses."""

    source: str
    architecture: str
    totals: Mapping[str, Any]
    layers: Mapping[str, StoredLayer]
    losses: Mapping[str, float]


def model_card(facts: Facts) -> str:
    """The text of README.md."""
    return _HEAD.format(
        source=facts.source,
        title=facts.source.rstrip("/").rpartition("/")[2],
        bits=facts.totals["bits_per_weight"] or float("nan"),
        parameter_bits=facts.totals["bits_per_parameter"],
        size=facts.totals["bytes"],
        source_size=facts.totals["source_bytes"],
        rows="".join(_rows(facts)),
    )


def _rows(facts: Facts) -> list[str]:
    """One row for every kind of layer (last part of the name) and scheme."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, layer in facts.layers.items():
        groups[name.rpartition(".")[2], str(layer.scheme)].append(name)
    rows = []
    for (kind, scheme), names in groups.items():
        weights = sum(_count(facts.layers[name]) for name in names)
        bits = 8 * sum(facts.layers[name].bytes for name in names) / weights
        loss = sum(facts.losses[name] for name in names) / len(names)
        rows.append(f"| {kind} | `{scheme}` | {len(names)} | {bits:.4f} | {loss:.3e} |\n")
    return rows


def _count(layer: StoredLayer) -> int:
    return layer.shape[0] * layer.shape[1]
