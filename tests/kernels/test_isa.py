"""FRACBIT_ISA: which instruction set the native kernels run on. It is read once, so every case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from fracbit.kernels.cpu import NATIVE, SETS

HERE = NATIVE.instruction_sets() if NATIVE is not None else []
STEP = """
import sys, torch
from fracbit.kernels import NativeProgram, PackedLinear, Span, Tables, kernel_report
from fracbit.kernels.program import in_a_row
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import Scheme

torch.manual_seed(0)
layer = PackedLinear(quantize_tensor(torch.randn(64, 160), Scheme("int", 4, 32)), "int8")
x, y = (program := NativeProgram(64, "int8")).register(160), program.register(64)
program.embed(torch.randn(7, 160), x, 1.0)
program.multiply([(layer, None)], x, [y])
heads = in_a_row(y, 4)
program.attend((heads, heads, heads), y, 0.25)
program.add(y, Span(0, 0, 64), keep=0.0)
store = torch.zeros(1, 2, 1, 4, 8, 16)
logits = program.advance(store, 1, torch.tensor([3]), torch.zeros(1).long(), tables=Tables())
sys.stderr.write(kernel_report())
sys.stdout.buffer.write(torch.cat([logits[0], layer(torch.randn(1, 160))[0]]).numpy().tobytes())
"""


def run(program: str, isa: str) -> subprocess.CompletedProcess[bytes]:
    """`program` in a process whose FRACBIT_ISA is `isa`; empty is as if it were unset."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = os.environ | {"FRACBIT_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
def test_every_instruction_set_can_be_forced() -> None:
    runs = {isa: run(STEP, isa) for isa in ("", *HERE)}
    for isa, done in runs.items():
        assert done.returncode == 0, done.stderr.decode()
        assert (f"{isa} alone (FRACBIT_ISA)" in done.stderr.decode()) == bool(isa)
    numbers = {isa: np.frombuffer(done.stdout, np.float32) for isa, done in runs.items()}
    assert len(numbers[""]) == 128
    assert np.array_equal(numbers[""], numbers[HERE[0]])
    for found in numbers.values():
        assert np.allclose(found, numbers[""], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["sse9", *(name for name in SETS if NATIVE is not None and name not in HERE)])
def test_one_that_is_not_there_is_refused(isa: str) -> None:
    done = run("from fracbit.kernels import PackedLinear", isa)
    assert done.returncode != 0
    message = done.stderr.decode()
    assert f"fracbit.errors.KernelError: FRACBIT_ISA is {isa!r}" in message
    assert "set it to one that this machine has" in message
    assert "plain" in message
