"""Room for hidden states, in memory or in a file: calibration tokens times width can exceed the memory of a
machine.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fracbit.errors import OutputError


def storage(shape: Sequence[int], dtype: torch.dtype, folder: Path | None = None) -> torch.Tensor:
    """Uninitialized room for hidden states: in memory, or, with a folder, in an unnamed file there that goes
    with the tensor.

    Raises OutputError when the folder cannot hold it.
    """
    size = int(torch.Size(shape).numel())
    if folder is None or size == 0:
        return torch.empty(*shape, dtype=dtype)
    wanted = size * dtype.itemsize
    try:
        descriptor, path = tempfile.mkstemp(prefix="hidden-", suffix=".tmp", dir=folder)
        try:
            _reserve(descriptor, wanted)
            return torch.from_file(path, shared=True, size=size, dtype=dtype).reshape(*shape)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        raise OutputError(
            f"cannot set aside {wanted / 1e9:.2f} GB for hidden states in {folder}: {error}; "
            "free space there, use fewer calibration tokens, or raise the memory limit."
        ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Claim the bytes now: on a full disk, a sparse file kills the process at the first write to its memory
    map.
    """
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size)
    else:
        for start in range(0, size, 1 << 24):
            os.write(descriptor, bytes(min(1 << 24, size - start)))
