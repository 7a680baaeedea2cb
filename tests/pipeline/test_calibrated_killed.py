"""SIGKILL from another process anywhere in a calibrated run, distillation included: resumed, it is the same to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fracbit.errors import FormatError, SourceError
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from outputs import contents
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# One process imports everything once and then forks a runner for each kill; it never uses torch itself.
KILLER = """
import json, os, signal, sys, time
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe

asked, folder, points = Recipe.model_validate(json.loads(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
for wanted, delay in points:
    reading, writing = os.pipe()
    runner = os.fork()
    if runner == 0:
        os.close(reading)
        status = 1
        try:
            show = lambda what, done, total: os.write(writing, f"{what}\\n".encode())
            write_checkpoint(asked, folder, resume=True, progress=show)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    for line in os.fdopen(reading):
        if wanted in line:
            time.sleep(delay)
            os.kill(runner, signal.SIGKILL)
            break
    ended = os.waitstatus_to_exitcode(os.waitpid(runner, 0)[1])
    whole = os.path.exists(folder + "/config.json") and not os.path.exists(folder + "/.fracbit")
    print(json.dumps([wanted, ended, whole]), flush=True)
"""
POINTS = [
    ("block 1 of 2: self_attn.o_proj", 0.0),  # before there is any shard of a block
    ("block 1 of 2: done", 0.005),
    ("block 2 of 2: mlp.up_proj", 0.002),
    ("block 2 of 2: done", 0.02),
    ("distilling", 0.01),
    ("distilling", 0.15),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs that it kills")
@pytest.mark.parametrize("tweak", ["auto", "train:epochs=2"])
def test_killed_anywhere_it_resumes_to_the_same_bytes(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, tweak: str
) -> None:
    tiny_llama(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    text = write_ids(tmp_path / "ids.u16", 16, 24)
    plan = Calibration(
        texts=(text,), samples=16, length=24, batch=4, transforms=("rotate", "smooth"),
        axis="nearest", tweak=tweak, distill=2,
    )  # fmt: skip
    asked = Recipe(
        model=str(tmp_path / "float"),
        scheme=Scheme("int", 3, 24),
        quantizer="descent",
        outliers="cost:0.05",
        embeddings=Scheme("int", 8, 24),
        calibration=plan,
    )
    words = [asked.model_dump_json(), str(tmp_path / "cut"), json.dumps(POINTS)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *words], capture_output=True, text=True, check=False, timeout=120
    )
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(attempts) == len(POINTS), done.stderr
    assert [ended for _, ended, _ in attempts[:5]] == [-9] * 5, (attempts, done.stderr)
    assert not any(whole for _, _, whole in attempts[:5])
    if not attempts[-1][2]:
        from fracbit.checkpoint.load import load

        with pytest.raises((FormatError, SourceError)):
            load(tmp_path / "cut")
        write_checkpoint(asked, tmp_path / "cut", resume=True)
    write_checkpoint(asked, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
