"""Law: every kernel computes what the reference computes, for every scheme, shape, batch, type and layout of activations."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from fracbit.errors import KernelError
from fracbit.kernels import KERNELS, PackedLinear, choose, cpu, kernel_report, reference
from fracbit.kernels.cpu import CPU, NATIVE, prepare, run, tiles_from
from fracbit.numerics import PackedTensor, quantize_tensor
from fracbit.records.scheme import Scheme

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
SETS = NATIVE.instruction_sets() if NATIVE is not None else []
TOLERANCE = {"float": 1e-5, "int8": 5e-3}

DTYPES = ["int", "float", "dynamic", "nf", "power", "kmeans", "kmeans:row", "quantile"]
BLOCKS = [8, 20, 64, "row", "tensor", "flat:43", "flat:64"]


def packed(scheme: Scheme, shape: tuple[int, int], outliers: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator) * 0.02 + 0.003
    if not outliers:
        return quantize_tensor(weight, scheme)
    columns = torch.randperm(shape[1], generator=generator)[:outliers].sort().values
    mask = torch.ones(shape[1], dtype=torch.bool)
    mask[columns] = False
    kept = quantize_tensor(weight[:, mask].contiguous(), scheme)
    fields = {name: getattr(kept, name) for name in ("codes", "scales", "offsets", "table")}
    return PackedTensor(
        scheme, shape, **fields, columns=columns.int(), outliers=weight[:, columns].bfloat16()
    )


def batch_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def legal(dtype: str, bits: int, offset: str) -> bool:
    fitted = dtype.startswith(("kmeans", "quantile"))
    if fitted and offset == "zero":
        return False
    if bits == 1:
        return dtype.startswith("kmeans") or (dtype == "int" and offset in ("zero", "float"))
    return dtype != "power" or bits > 1


GRID = [
    Scheme(dtype, bits, block, axis, offset)
    for dtype in DTYPES
    for bits in range(1, 9)
    for block in BLOCKS
    for axis in ("in", "out")
    for offset in ("none", "zero", "float", "mean")
    if legal(dtype, bits, offset) and not (axis == "out" and str(block) in ("tensor", "flat:43", "flat:64"))
]


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_scheme(isa: str, bits: int) -> None:
    """All data types, blocks, axes and offsets of one width; every fourth scheme for the slower instruction sets."""
    schemes = [scheme for scheme in GRID if scheme.bits == bits]
    for scheme in schemes if isa == SETS[0] else schemes[::4]:
        weight = packed(
            scheme, (25, 172)
        )  # with 8 rows of activations: enough numbers for an error to be an average
        x = batch_of(8, 172)
        expected = reference.linear(x, weight)
        for path, tolerance in TOLERANCE.items():
            error = distance(run(prepare(weight, path, isa), x), expected)
            # One bit with a zero point is mostly zeros: what is left is smaller than the rounding of its activations.
            allowed = tolerance if bits > 1 or path == "float" else 4 * tolerance
            assert error < allowed, f"{scheme} axis {scheme.axis}, {path}: {error:.2e}"


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 8), (5, 7), (172, 64), (64, 172), (3, 3669), (33, 129), (130, 1)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_odd_shapes(isa: str, shape: tuple[int, int], bits: int) -> None:
    for axis in ("in", "out"):
        for offset in ("none", "zero"):
            weight = packed(Scheme("int", bits, 64, axis, offset), shape)
            x = batch_of(2, shape[1])
            expected = reference.linear(x, weight)
            assert distance(run(prepare(weight, "float", isa), x), expected) < 1e-5
            assert (
                distance(run(prepare(weight, "int8", isa), x), expected) < 2e-2
            )  # few sums: errors do not average out


@native
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 33, 70])
def test_batches(axis: str, rows: int) -> None:
    weight = packed(Scheme("nf", 4, 32, axis), (96, 200), outliers=3)
    x = batch_of(rows, 200)
    for path, tolerance in TOLERANCE.items():
        y = PackedLinear(weight, path)(x)
        assert y.shape == (rows, 96)
        assert distance(y, reference.linear(x, weight)) < tolerance


@native
@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_way_for_many_rows(
    dtype: torch.dtype, bf16: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows of codes or by tiles, as this processor or another would take them: one product; the last tile is short."""
    monkeypatch.setattr(cpu, "BF16_PRODUCTS", bf16)
    monkeypatch.setattr(cpu, "AVX512", avx512)
    weight = packed(Scheme("int", 4, 64, offset="float"), (2 * cpu.TILE_ROWS + 37, 2200), outliers=2)
    assert tiles_from(False, dtype) < 130
    for rows in (2, 33, 130):
        x = batch_of(rows, 2200, dtype)
        expected = reference.linear(x.float(), weight)
        for path, tolerance in TOLERANCE.items():
            y = PackedLinear(weight, path)(x)
            assert y.dtype == dtype
            assert distance(y, expected) < tolerance + (dtype != torch.float32) * 2 * torch.finfo(dtype).eps


@native
def test_quantized_scales_and_scale_types() -> None:
    for scale in ("fp32", "fp16", "bf16", "int8:256", "dynamic8:64"):
        for offset in ("none", "zero", "float"):
            weight = packed(Scheme("int", 3, 16, offset=offset, scale=scale), (40, 96))
            x = batch_of(2, 96)
            assert distance(PackedLinear(weight)(x), reference.linear(x, weight)) < 1e-5


@native
def test_strided_unaligned_and_leading_dimensions() -> None:
    weight = packed(Scheme("int", 5, 64), (24, 136))
    expected = reference.linear(batch_of(6, 136), weight)
    storage = torch.zeros(6 * 300 + 1)
    view = storage[1:].view(6, 300)[:, 3:139]  # rows apart, start at no multiple of anything
    view.copy_(batch_of(6, 136))
    linear = PackedLinear(weight)
    assert distance(linear(view), expected) < 1e-5
    assert distance(linear(view.T.contiguous().T), expected) < 1e-5
    assert distance(linear(batch_of(6, 136).view(2, 3, 136)).view(6, 24), expected) < 1e-5
    assert (
        distance(
            linear(batch_of(1, 136).expand(4, 136)), reference.linear(batch_of(1, 136).expand(4, 136), weight)
        )
        < 1e-5
    )
    bytes_at_1 = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8)[1:].view(weight.codes.shape)
    bytes_at_1.copy_(weight.codes)
    moved = PackedTensor(weight.scheme, weight.shape, bytes_at_1, weight.scales)
    assert distance(PackedLinear(moved)(view), expected) < 1e-5


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_not_a_number_is_not_hidden(axis: str, isa: str) -> None:
    weight = packed(Scheme("int", 4, 64, axis), (8, 640))
    for bad in (float("nan"), float("inf")):
        x = batch_of(2, 640)
        x[1, 5] = bad
        for path in TOLERANCE:
            y = run(prepare(weight, path, isa), x)
            assert torch.isfinite(y[0]).all()
            assert not torch.isfinite(y[1]).any()


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
def test_scales_folded_into_activations(scale: str, isa: str) -> None:
    """Blocks along `out` of rows that end with a whole chunk or within one; scales that are subnormal in half precision."""
    for dtype, bits, offset in (("nf", 4, "none"), ("int", 3, "float"), ("int", 4, "zero")):
        for columns, size in ((640, 1.0), (700, 1.0), (640, 1e-4)):
            weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(7)) * 0.02 * size
            stored = quantize_tensor(weight, Scheme(dtype, bits, 16, "out", offset, scale))
            x = batch_of(8, columns)
            expected = reference.linear(x, stored)
            for path, tolerance in TOLERANCE.items():
                assert distance(run(prepare(stored, path, isa), x), expected) < tolerance


@pytest.fixture
def three_threads() -> Iterator[None]:
    """torch, and with it the kernels, on three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@native
@pytest.mark.usefixtures("three_threads")
def test_threads_and_concurrent_callers() -> None:
    weight = packed(Scheme("nf", 4, 64, "out"), (512, 1024))
    linear, x = PackedLinear(weight), batch_of(1, 1024)
    expected = reference.linear(x, weight)
    errors: list[float] = []

    def work() -> None:
        errors.extend(distance(linear(x), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 200
    assert max(errors) < 1e-5


@native
@pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="a torch without GNU's OpenMP",
)
def test_the_workers_are_those_of_torch() -> None:
    assert NATIVE.on_threads_of_torch()
    assert "threads of torch" in CPU.explain()


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("three_threads")
def test_forked_child_has_a_pool_of_its_own() -> None:
    weight = packed(Scheme("int", 4, 64), (256, 512))
    prepared, x = prepare(weight, "float"), batch_of(1, 512)
    y = x.new_empty((1, 256))
    for _ in range(20):
        prepared.weight.multiply(x, y, False, 2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_forked, args=(results, prepared.weight, x))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(results.get(timeout=10)), y[0])


def _forked(results: "multiprocessing.Queue[list[float]]", weight: object, x: torch.Tensor) -> None:
    y = x.new_empty((1, 256))
    for _ in range(20):
        weight.multiply(x, y, False, 2)
    results.put(y[0].tolist())


FIRST_USED_IN_A_CHILD = """
import os, signal, torch
from fracbit.kernels import PackedLinear
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

weight = quantize_tensor(torch.randn(512, 1024), Scheme("int", 4, 64))
torch.set_num_threads(5)
torch.ones(3, 1 << 18).exp()
child = os.fork()
signal.alarm(30)  # a thread that waits for others which the fork left behind waits for ever
y = PackedLinear(weight)(torch.ones(1, 1024))
if child == 0:
    os._exit(0 if torch.isfinite(y).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_first_used_in_a_child_of_a_process_with_threads() -> None:
    """A child has no threads of torch, whether or not the kernels ran before; and there may be fewer than asked for."""
    environment = os.environ | {"OMP_THREAD_LIMIT": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_USED_IN_A_CHILD],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@native
def test_packed_memory_is_shared_not_copied() -> None:
    weight = packed(Scheme("nf", 4, 64), (256, 4096))
    prepared = prepare(weight, "int8")
    assert prepared.weight.derived_bytes < 20_000


def test_the_table_always_has_an_answer() -> None:
    scheme = Scheme()
    for device in ("cpu", "meta"):
        assert choose(scheme, torch.device(device), (8, 8)) in KERNELS
    assert choose(scheme, torch.device("meta"), (8, 8)).name == "reference"
    assert [line.split(":")[0] for line in kernel_report().splitlines()] == [
        kernel.name for kernel in KERNELS
    ]


def test_without_the_native_module_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fracbit.kernels.cpu"]
    monkeypatch.setattr(module, "NATIVE", None)
    weight = packed(Scheme("int", 4, 64), (16, 64))
    linear = PackedLinear(weight)
    assert linear.kernel.name == "reference"
    assert torch.equal(linear(batch_of(2, 64)), reference.linear(batch_of(2, 64), weight))
    with pytest.raises(KernelError):
        CPU.prepare(weight, "float")


def test_what_does_not_fit_is_refused() -> None:
    weight = packed(Scheme("int", 4, 64), (16, 64))
    with pytest.raises(KernelError, match="not a path"):
        PackedLinear(weight, "int4")  # type: ignore[arg-type]
    linear = PackedLinear(weight)
    with pytest.raises(KernelError, match="64 input channels"):
        linear(batch_of(2, 63))
    with pytest.raises(KernelError, match="float32, float16 or bfloat16"):
        linear(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(KernelError, match="meta"):
        linear(torch.zeros(2, 64, device="meta"))
