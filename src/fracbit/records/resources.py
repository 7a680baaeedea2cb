"""What a run takes of its machine. Torch-free."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from fracbit.records.sizes import print_size


@dataclass(frozen=True)
class Needs:
    """What a run will take: resident memory, disk and time. Reading texts and writing to disk take time that is not counted.

    `phases`: the seconds of each phase, in order, where there are several.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Such as `about 4 min, 0.9 GB of memory, 58 MB on disk`."""
        memory, disk = print_size(self.memory_bytes), print_size(self.disk_bytes)
        return f"about {print_seconds(self.seconds)}, {memory} of memory, {disk} on disk"


def print_seconds(seconds: float) -> str:
    """A duration in two digits or so, such as `0.8 s`, `45 s`, `12 min` or `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_rss() -> int:
    """The most memory this process ever had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
