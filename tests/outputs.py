"""What a test looks at in an output folder, and what the model in it answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing of ours may catch it."""


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest(folder: Path) -> dict[str, Any]:
    """The record beside a checkpoint."""
    return json.loads((folder / "fracbit.json").read_text())  # type: ignore[no-any-return]


def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of `ids` [samples, length], or of one sample of 37 ids from 3 on."""
    import torch

    with torch.no_grad():
        found = model(torch.arange(3, 40)[None] if ids is None else ids).logits
    assert isinstance(found, torch.Tensor)
    return found
