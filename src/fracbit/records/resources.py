"""What this process takes of its machine. Torch-free."""

import resource
import sys


def peak_rss() -> int:
    """The most memory this process ever had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
