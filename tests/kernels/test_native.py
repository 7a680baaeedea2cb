"""The native kernels without Python, for a processor that is not this one. sanitize.sh, which CI runs, covers this one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"{CROSS} and {EMULATOR} are not installed"
)
def test_neon_in_an_emulator(tmp_path: Path) -> None:
    """Both NEON units and plain C++ compute what a sum in double precision gives, in buffers of exactly their size."""
    script = Path(__file__).parent / "native" / "sanitize.sh"
    environment = os.environ | {"CXX": CROSS, "RUN": f"{EMULATOR} -L /usr/aarch64-linux-gnu"}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path), "none", "31"],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon dot neon plain: 0 failed" in done.stdout
