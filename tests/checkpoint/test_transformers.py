"""The saved format as transformers sees it, in fresh processes: with fracbit it loads, without it stops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.models.quant_linear import QuantLinear
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LOAD = """
{before}
import torch
from transformers import AutoModelForCausalLM
{after}
model = AutoModelForCausalLM.from_pretrained({folder!r}, {how})
torch.save(model(torch.arange(3, 40)[None]).logits, {result!r})
"""


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("hf")
    tiny_llama(tie_word_embeddings=True).save_pretrained(base / "float")
    write_checkpoint(
        Recipe(model=str(base / "float"), scheme=Scheme("nf", 4, 32), embeddings=Scheme("int", 8, 32)),
        base / "q",
    )
    return base / "q"


def fresh(
    folder: Path, tmp_path: Path, before: str = "", after: str = "", how: str = ""
) -> subprocess.CompletedProcess[str]:
    script = LOAD.format(
        before=before, after=after, folder=str(folder), how=how, result=str(tmp_path / "logits.pt")
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_fracbit_before_or_after_transformers(folder: Path, tmp_path: Path, order: str) -> None:
    done = fresh(folder, tmp_path, **{order: "import fracbit"})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(folder)(torch.arange(3, 40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_without_fracbit_loading_stops(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, bits: int
) -> None:
    """8 bits is the trap: a byte per weight, so that codes of the weight's own shape would load as weights."""
    tiny_llama().save_pretrained(tmp_path / "float")
    write_checkpoint(Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", bits, 32)), tmp_path / "q")
    done = fresh(tmp_path / "q", tmp_path)
    assert done.returncode != 0
    assert "MISMATCH" in done.stderr
    assert not (tmp_path / "logits.pt").exists()


def test_device_map(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = fresh(folder, tmp_path, before="import fracbit", how='device_map={"": "cpu"}')
    assert done.returncode == 0, done.stderr
    done = fresh(folder, tmp_path, before="import fracbit", how='device_map="auto"')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_what_is_not_quantized(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert layer.weight_scales.dtype == torch.float16
    assert model.model.norm.weight.dtype == dtype
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    assert logits.dtype == dtype
    with torch.no_grad():
        exact = load(folder, torch.float32)(torch.arange(3, 40)[None]).logits
    assert torch.allclose(logits.float(), exact, atol=0.05)


def test_save_pretrained_round_trip_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "b"))
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_a_format_of_the_future_is_refused(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from fracbit.errors import FormatError

    shutil.copytree(folder, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"format version 2.*update fracbit"):
        load(tmp_path / "new")


def test_generation(folder: Path) -> None:
    model = load(folder)
    ids = model.generate(torch.arange(3, 8)[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert ids.shape == (1, 10)


def test_pipelines(tmp_path: Path) -> None:
    """A stock pipeline from the folder's name alone, one text and a batch: what `generate` writes."""
    write_checkpoint(Recipe(model=str(bundled_model()), scheme=Scheme("int", 4, 64)), tmp_path / "q")
    writer = pipeline("text-generation", model=str(tmp_path / "q"), dtype="float32")
    how = {"max_new_tokens": 6, "do_sample": False}
    tokenizer, prompt = load_tokenizer(tmp_path / "q"), "def main("
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = load(tmp_path / "q", "float32").generate(inputs.input_ids, **how)[0]
    alone = writer(prompt, **how)[0]["generated_text"]
    assert alone == tokenizer.decode(expected, skip_special_tokens=True)
    assert [found[0]["generated_text"] for found in writer([prompt, prompt], **how)] == [alone, alone]


@pytest.mark.parametrize(
    "first", ["fracbit", "fracbit.checkpoint.hf", "fracbit.checkpoint.load", "transformers.quantizers.auto"]
)
def test_whatever_is_imported_first_fracbit_is_registered_once(first: str) -> None:
    code = (
        f"import {first}, fracbit; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'fracbit' in found"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
