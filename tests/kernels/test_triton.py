"""The Triton kernel equals the reference: in Triton's interpreter on the CPU, and on a GPU when there is one.

The interpreter is chosen when Triton is imported, so it runs in a process of its own. Triton takes a gigabyte and torch's CPU
builds come without it, so it is not among the development tools; CI installs it beside them.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fracbit.kernels import reference
from fracbit.kernels.gpu import AVAILABLE, GEMV_ROWS, GPU, prepare, run
from fracbit.numerics import quantize_tensor
from fracbit.numerics.packed import table_of
from fracbit.records.scheme import Scheme

installed = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")

SCHEMES = [
    Scheme("int", 4, 64), Scheme("nf", 4, 64, "out"), Scheme("kmeans:row", 4, 32), Scheme("kmeans", 3, 64, "out", "float"),
    Scheme("int", 2, 16, "in", "zero"), Scheme("int", 3, 16, "out", "zero"), Scheme("int", 5, "row"), Scheme("nf", 6, "tensor"),
    Scheme("int", 8, "row", "out"), Scheme("dynamic", 8, 20), Scheme("float", 7, "flat:43"),
    Scheme("ocp", 8, "16x32"), Scheme("int", 4, "8x64", offset="zero"),
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


# Codes by the byte and a scale for every weight along `out`; whole integers in one whole tile; several tiles, the last in part;
# prompts.
SIZES = {
    (21, 172): (1, 3, GEMV_ROWS + 4),
    (12, 256): (1, 3, GEMV_ROWS, GEMV_ROWS + 4),
    (9, 2144): (1,),
    (12, 160): (70, 130),
}


def check(device: str, every: int = 1) -> None:
    """GEMV and GEMM on `device`, for the schemes above and every n-th of all data types, axes and offsets."""
    for scheme in SCHEMES + EVERY[::every]:
        for shape in list(SIZES)[: 3 if scheme in SCHEMES else 2]:
            compare(scheme, shape, device)
    compare(Scheme("int", 4, 64), (12, 262), device, outliers=6)
    compare(Scheme("nf", 4, 64, "out"), (12, 256), device, outliers=3)
    compare(Scheme("nf", 4, 64), (12, 256), device, dtype=torch.float16)
    compare(Scheme("int", 3, 64), (12, 160), device, dtype=torch.float16)
    compare(Scheme("int", 8, 64), (9, 2144), device, mean=3.0)  # where what is added to codes cancels worst
    # One row: the interpreter has no matrix product of bfloat16.
    compare(Scheme("nf", 4, 64), (9, 2144), device, dtype=torch.bfloat16)


def compare(
    scheme: Scheme,
    shape: tuple[int, int],
    device: str,
    outliers: int = 0,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
) -> None:
    """Every number of rows of `SIZES`, with `outliers` columns in 16 bits, against the reference in the same type."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(shape, generator=generator), torch.randn((130, shape[1]), generator=generator)
    columns = torch.arange(0, 5 * outliers, 5) if outliers else None
    packed = quantize_tensor(weight, scheme, columns=columns).to(device)
    x = (x + mean).to(device, dtype)
    for count in SIZES.get(shape, (1, GEMV_ROWS + 4)):
        y, expected = run(prepare(packed, "float"), x[:count]), reference.linear(x[:count], packed)
        error = float((y.float() - expected.float()).norm() / expected.float().norm())
        limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert y.dtype == dtype
        assert error < limit, f"{scheme} axis {scheme.axis}, {shape}, {count} rows of {dtype}: {error:.2e}"


# Conversions, exchanges between threads, spilled registers.
UNWANTED = ("I2F", "I2FP", "SHFL", "STL", "LDL")


def instructions(
    scheme: Scheme, count: int, activations: torch.dtype = torch.bfloat16
) -> tuple[list[str], list[str]]:
    """Machine code of compute capability 9.0, for which Triton needs no GPU: (all, of the loop over the input)."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.disasm import get_sass

    from fracbit.kernels.triton_linear import ONE, _gemm, _gemv, constants_of, options_of

    dot, width = count > GEMV_ROWS, 2048
    weight = prepare(quantize_tensor(torch.randn(64, width), scheme), "float")
    program, constants = (
        _gemm if dot else _gemv,
        constants_of(weight, torch.empty(count, width, dtype=activations), dot),
    )
    blocks = 1 if weight.along_out else weight.scale.shape[1]
    numbers = {"one": ONE, "n_rows": count, "rows": 64, "length": width, "width": width, "blocks": blocks}
    numbers |= {"stride": weight.codes.shape[1]}
    codes = f"*i{8 * weight.codes.itemsize}"
    name = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[activations]
    kinds = {"x": name, "y": name, "codes": codes, "table": "*fp32"}
    kinds |= dict.fromkeys(("scale", "shift"), "*fp16") | dict.fromkeys(numbers, "i32")
    # What Triton does itself when it runs: an argument of 1 is a constant, one that 16 divides is known to be so.
    free = [parameter.name for parameter in program.params if not parameter.do_not_specialize]
    constants |= {name: number for name, number in numbers.items() if number == 1 and name in free}
    divisible = [name for name in kinds if kinds[name][0] == "*" or numbers[name] % 16 == 0]
    places = [program.arg_names.index(name) for name in divisible if name in free]
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(program, kinds, constants, {(place,): [["tt.divisibility", 16]] for place in places})
    compiled = compile_source(source, target=GPUTarget("cuda", 90, 32), options=options_of(dot))
    lines = [line.split("\t")[-1] for line in get_sass(compiled.asm["cubin"]).splitlines()]
    return lines, loop_of(lines)


def loop_of(lines: list[str]) -> list[str]:
    """The longest run of instructions between a mark and a jump back to it."""
    marks = {line[:-1]: at for at, line in enumerate(lines) if line.startswith("LBB")}
    jumps = [(at, re.search(r"BRA.* (LBB\d+);", line)) for at, line in enumerate(lines)]
    return max((lines[marks[jump[1]] : at] for at, jump in jumps if jump), key=len)


def compile_for_h100() -> None:
    """What the reckoning in docs/serving.md rests on: the loop of GEMV is short, converts nothing and exchanges nothing."""
    for scheme, limit in (
        (Scheme("int", 4, 64), 4.5), (Scheme("int", 4, 64, "out"), 4.4), (Scheme("nf", 4, 64), 5.4),
        (Scheme("kmeans", 4, 64, "out"), 5.2), (Scheme("kmeans:row", 4, 64), 5.4), (Scheme("int", 3, 64), 5.1),
    ):  # fmt: skip
        code, loop = instructions(scheme, 1)
        kinds = Counter(re.sub(r"^@!?U?P\w+ ", "", line).split(".")[0].split(" ")[0] for line in loop)
        weights = 8 * 2048 // 64  # of a thread in one turn of the loop: eight rows, shared by 64 threads
        table, words = scheme.dtype != "int", 2 if scheme.bits == 3 else 1
        assert len(loop) < limit * weights, f"{scheme}: {len(loop) / weights:.2f} instructions a weight"
        assert kinds["BAR"] == 2 * table, f"{scheme}: barriers in the loop, beside those around the table"
        assert not any(kinds[kind] for kind in UNWANTED), f"{scheme}: {kinds}"
        assert kinds["LDG"] <= weights * (words + 1) // 8 + 16, f"{scheme}: not one load for eight codes"
        assert not matrix_units(code)
    assert any("LDG.E.128" in line for line in instructions(Scheme("int", 4, 64), 1, torch.float32)[1])
    prompt = instructions(Scheme("int", 4, 64), 128)[1]
    assert matrix_units(prompt)
    assert len(prompt) < 9 * 64 * 64 // 128, "instructions for one weight and 128 rows"


def matrix_units(code: list[str]) -> bool:
    return any(re.search(r"\b(HMMA|HGMMA|WGMMA)\b", line) for line in code)


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


@pytest.mark.parametrize(
    "scheme", [Scheme("int", bits, 64, "in", offset) for bits in range(2, 9) for offset in ("none", "zero")]
)
def test_integers_are_a_line(scheme: Scheme) -> None:
    packed = quantize_tensor(torch.randn(4, 64), scheme)
    prepared = prepare(packed, "float")
    assert prepared.form == "even"
    values = table_of(packed).values[0].double()
    least, span = prepared.table.double()
    line = least + span * torch.arange(len(values)) / 2**scheme.bits
    assert float((line - values).abs().max()) < 4e-7 * float(values[-1] - values[0])


def test_other_tables_are_none() -> None:
    for scheme, form in (
        (Scheme("nf", 4), "shared"),
        (Scheme("kmeans", 3), "shared"),
        (Scheme("kmeans:row", 3), "own"),
    ):
        assert prepare(quantize_tensor(torch.randn(4, 64), scheme), "float").form == form


def test_it_leaves_the_cpu_alone() -> None:
    assert not GPU.supports(Scheme(), torch.device("cpu"), (8, 8))
