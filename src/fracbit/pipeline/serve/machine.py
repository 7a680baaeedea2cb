"""What runs here: versions, kernels and why these, threads, memory, GPUs. `fracbit env` prints it for a report of a bug."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from fracbit.kernels.table import kernel_report
from fracbit.records.extras import origin
from fracbit.records.sizes import print_size
from fracbit.records.version import __version__

VARIABLES = (
    "FRACBIT_",
    "OMP_",
    "MKL_",
    "KMP_",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "TRANSFORMERS_",
)
"""Beginnings of the environment variables that change what runs; no other is shown."""
SECRET = "KEY"
"""In the names of variables whose values nobody is shown."""
DEVELOPERS = {"dev", "docs", "test"}
"""Extras for those who change fracbit."""


@dataclass(frozen=True)
class Machine:
    """A machine and what is installed on it. `memory`, `available`: bytes, None where the system does not say.

    `packages`: version by name, of the packages that fracbit and its extras name; "" for one that is missing.
    """

    fracbit: str
    installed: str
    python: str
    system: str
    processor: str
    cores: int
    threads: int
    memory: int | None
    available: int | None
    gpus: tuple[str, ...]
    kernels: tuple[str, ...]
    packages: Mapping[str, str]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        """All of it, a line each."""
        size = "unknown" if self.memory is None else print_size(self.memory)
        free = "" if self.available is None else f", {print_size(self.available)} available"
        there = [f"{name} {number}" for name, number in self.packages.items() if number]
        missing = [name for name, number in self.packages.items() if not number]
        lines = {
            "fracbit": f"{self.fracbit} ({self.installed})",
            "python": f"{self.python}, {self.system}",
            "processor": f"{self.processor}, {self.cores} cores for this process, {self.threads} threads",
            "memory": size + free,
            "gpu": ", ".join(self.gpus) or "none that torch can use",
            "kernels": "\n           ".join(self.kernels),
            "packages": ", ".join(there),
            "missing": ", ".join(missing) or "nothing",
            "variables": ", ".join(f"{name}={value}" for name, value in self.variables.items()) or "none",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def machine() -> Machine:
    """The machine as this process sees it."""
    memory = _memory()
    return Machine(
        fracbit=__version__,
        installed=origin(),
        python=platform.python_version(),
        system=platform.platform(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        gpus=_gpus(),
        kernels=tuple(kernel_report().splitlines()),
        packages=_packages(),
        variables={
            name: "(set)" if SECRET in name else value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES)
        },
    )


def _processor() -> str:
    """The name of the processor, from Linux, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor()) or 'unknown'} ({platform.machine()})"


def _memory() -> dict[str, int]:
    """Linux's figures in bytes; nothing elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(f"{each.name} ({print_size(each.total_memory)})" for each in found)


def _packages() -> dict[str, str]:
    """Versions of what fracbit requires, and of what its extras add for users."""
    try:
        wanted = [Requirement(line) for line in requires("fracbit") or []]
        extras = set(metadata("fracbit").get_all("Provides-Extra") or ()) - DEVELOPERS
    except PackageNotFoundError:  # sources on PYTHONPATH
        wanted, extras = (
            [Requirement(name) for name in ("torch", "transformers", "safetensors", "numpy")],
            set(),
        )
    names = [
        each.name
        for each in wanted
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
    return {name: _version(name) for name in names if name != "fracbit"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
