"""The Triton kernel equals the reference: in Triton's interpreter on the CPU, and on a GPU when there is one.

The interpreter is chosen when Triton is imported, so it runs in a process of its own. Triton takes a gigabyte and torch's CPU
builds come without it, so it is not among the development tools; CI installs it beside them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fracbit.kernels import reference
from fracbit.kernels.gpu import AVAILABLE, GEMV_ROWS, GPU, prepare, run
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

installed = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")

SCHEMES = [
    Scheme("int", 4, 64), Scheme("nf", 4, 64, "out"), Scheme("kmeans:row", 4, 32), Scheme("kmeans", 3, 64, "out", "float"),
    Scheme("int", 2, 16, "in", "zero"), Scheme("int", 3, 16, "out", "zero"), Scheme("int", 5, "row"), Scheme("nf", 6, "tensor"),
    Scheme("int", 8, "row", "out"), Scheme("dynamic", 8, 20), Scheme("float", 7, "flat:43"),
    Scheme("int", 1, 64, "in", "float"),
    Scheme("int", 4, 64, scale="int8:256"), Scheme("power", 4, 64, scale="bf16"),
]  # fmt: skip


DTYPES = ("int", "float", "dynamic", "nf", "power", "kmeans", "kmeans:row", "quantile")
EVERY = [
    Scheme(dtype, bits, block, axis, offset)
    for dtype in DTYPES
    for bits in (2, 3, 4, 8)
    for block in (20, 64)
    for axis in ("in", "out")
    for offset in ("none", "zero", "mean")
    if not (offset == "zero" and dtype.startswith(("kmeans", "quantile")))
]


def check(device: str, every: int = 1) -> None:
    """GEMV and GEMM on `device`, for the schemes above and every n-th of all data types, axes and offsets."""
    generator = torch.Generator().manual_seed(1)
    weight, x = (
        torch.randn((37, 172), generator=generator),
        torch.randn((GEMV_ROWS + 4, 172), generator=generator),
    )
    for scheme in SCHEMES + EVERY[::every]:
        packed = quantize_tensor(weight, scheme).to(device)
        for count in (1, 3, GEMV_ROWS, GEMV_ROWS + 4):
            y = run(prepare(packed, "float"), x[:count].to(device))
            expected = reference.linear(x[:count].to(device), packed)
            error = float((y - expected).norm() / expected.norm())
            assert error < 1e-5, f"{scheme} axis {scheme.axis}, {count} rows: {error:.2e}"


def compile_for_h100() -> None:
    """GEMV and GEMM down to machine code of compute capability 9.0, for which Triton needs no GPU."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fracbit.kernels.triton_linear import _linear, constants_of

    arguments = dict.fromkeys(("scale", "shift"), "*fp16") | {"x": "*bf16", "codes": "*u8"}
    arguments |= {"table": "*fp32", "y": "*fp32"}
    arguments |= dict.fromkeys(("n_rows", "rows", "kept", "stride", "blocks"), "i32")
    for scheme, rows in (
        (Scheme("int", 4, 64), 1),
        (Scheme("int", 4, 64), GEMV_ROWS + 1),
        (Scheme("kmeans:row", 3, 16, "out", "float"), 1),
    ):
        weight = prepare(quantize_tensor(torch.randn(64, 128), scheme), "float")
        constants = constants_of(weight, rows, dot=rows > GEMV_ROWS)
        source = ASTSource(_linear, arguments | dict.fromkeys(constants, "constexpr"), constants)
        code = compile_source(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ".target sm_90" in code
        assert ("wgmma" in code or "mma.sync" in code) == (rows > GEMV_ROWS), "matrix units in GEMM alone"


def in_a_process(call: str, **environment: str) -> None:
    """Triton reads its environment when it is imported."""
    paths = os.pathsep.join(filter(None, sys.path))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {here!r}); import test_triton; test_triton.{call}",
        ],
        env=dict(os.environ, PYTHONPATH=paths, **environment),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@installed
def test_equals_the_reference_in_the_interpreter() -> None:
    in_a_process("check('cpu', 37)", TRITON_INTERPRET="1")


@installed
def test_compiles_for_an_h100(tmp_path: Path) -> None:
    in_a_process("compile_for_h100()", TRITON_CACHE_DIR=str(tmp_path))


@installed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_equals_the_reference_on_a_gpu() -> None:
    check("cuda")


def test_it_leaves_the_cpu_alone() -> None:
    assert not GPU.supports(Scheme(), torch.device("cpu"), (8, 8))
