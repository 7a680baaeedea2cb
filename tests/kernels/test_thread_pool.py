"""FRACBIT_THREAD_POOL: whose threads the native kernels use. It is read once, so every case is a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from fracbit.kernels.cpu import NATIVE

native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
openmp = pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="a torch without GNU's OpenMP",
)

PRODUCTS = """
import sys, torch
from fracbit.kernels import PackedLinear, kernel_report
from fracbit.kernels.cpu import prepare
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

torch.set_num_threads(3)
generator = torch.Generator().manual_seed(7)
weight, x = torch.randn(600, 1024, generator=generator), torch.randn(5, 1024, generator=generator)
for axis in ("in", "out"):
    for path in ("float", "int8"):
        linear = PackedLinear(quantize_tensor(weight, Scheme("nf", 4, 64, axis)), path)
        sys.stdout.buffer.write(linear(x).numpy().tobytes())
tile = torch.empty(600, 1024)
linear.prepared.weight.decode(0, tile, 3)
sys.stdout.buffer.write(tile.numpy().tobytes())
sys.stderr.write(kernel_report())
"""

THREADS = """
import os, torch
from fracbit.kernels import PackedLinear
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

def count(): return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
linear = PackedLinear(quantize_tensor(torch.randn(4096, 1024), Scheme("int", 4, 64)))
torch.set_num_threads(3)
before = count()
linear(torch.ones(1, 1024))
packed = count()
torch.ones(3, 1 << 18).exp()
print(packed - before, count() - packed)
"""


def run(program: str, pool: str | None) -> "subprocess.CompletedProcess[bytes]":
    """`program` in a process whose FRACBIT_THREAD_POOL is `pool`, or unset."""
    environment = {name: value for name, value in os.environ.items() if name != "FRACBIT_THREAD_POOL"}
    if pool is not None:
        environment["FRACBIT_THREAD_POOL"] = pool
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)


@native
def test_either_pool_gives_the_same_bytes_and_is_reported() -> None:
    runs = {pool: run(PRODUCTS, pool) for pool in (None, "torch", "own")}
    for done in runs.values():
        assert done.returncode == 0, done.stderr.decode()
    assert len(runs[None].stdout) == 4 * (4 * 5 * 600 + 600 * 1024)
    assert runs["own"].stdout == runs["torch"].stdout == runs[None].stdout
    assert b"threads of their own (FRACBIT_THREAD_POOL=own)" in runs["own"].stderr
    assert b"FRACBIT_THREAD_POOL" not in runs["torch"].stderr
    assert runs["torch"].stderr == runs[None].stderr


@native
@openmp
@pytest.mark.parametrize(("pool", "of_torch"), [("torch", 0), ("own", 2)])
def test_the_threads_are_those_that_were_chosen(pool: str, of_torch: int) -> None:
    """A product on three threads starts two. A loop of torch then uses these two, or starts two more."""
    done = run(THREADS, pool)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"2", str(of_torch).encode()]


def test_an_unknown_pool_is_refused() -> None:
    done = run("from fracbit.kernels import PackedLinear", "4")
    assert done.returncode != 0
    message = done.stderr.decode()
    assert "fracbit.errors.KernelError: FRACBIT_THREAD_POOL is '4'" in message
    assert "torch or own" in message
    assert "OMP_NUM_THREADS" in message


FORKED = """
import os, time
import torch
from fracbit.kernels import PackedLinear
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

torch.set_num_threads(2)
linear = PackedLinear(quantize_tensor(torch.randn(1024, 1024), Scheme("int", 4, 64)))
x = torch.randn(4, 1024)
y = linear(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x), y) else 1)
until = time.monotonic() + 60
while time.monotonic() < until:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.02)
os.kill(child, 9)
raise SystemExit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_packed_products_go_on_in_a_forked_child() -> None:
    """At two threads, after they ran in the parent. Products of torch hang there, whatever fracbit does (docs/serving.md)."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
