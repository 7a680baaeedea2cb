"""Products by packed weights: layouts of activations, threads and forked processes, memory, and what is refused."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from fracbit.errors import KernelError
from fracbit.kernels import PackedLinear, reference
from fracbit.kernels.cpu import CPU, NATIVE, prepare
from fracbit.numerics import PackedTensor
from fracbit.records.scheme import Scheme
from products import batch_of, packed
from tensors import distance

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


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
    with pytest.raises(KernelError, match="unknown"):
        PackedLinear(weight, "int4")  # type: ignore[arg-type]
    linear = PackedLinear(weight)
    with pytest.raises(KernelError, match="64 input channels"):
        linear(batch_of(2, 63))
    with pytest.raises(KernelError, match="float32, float16 or bfloat16"):
        linear(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(KernelError, match="meta"):
        linear(torch.zeros(2, 64, device="meta"))
