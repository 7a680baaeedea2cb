"""Export as plain floats: transformers alone reads it and predicts what the fracbit checkpoint does; the rest is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import fracbit
from families import CONFIGS, UNKNOWN, model_of, tokens
from fracbit.checkpoint.export import pieces
from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.export.old_keys import with_old_keys
from fracbit.checkpoint.folder import JOURNAL
from fracbit.checkpoint.format import FORMAT_VERSION
from fracbit.checkpoint.load import load
from fracbit.errors import FormatError, OutputError, RecipeError, WeightError
from fracbit.numerics import decode
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import logits

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

FAMILIES = [*CONFIGS, *UNKNOWN]
Maker = Callable[..., "LlamaForCausalLM"]
INT = Scheme("int", 4, 32, offset="zero")
READER = """
import sys, pathlib, torch
from transformers import AutoModelForCausalLM
ids = torch.load(pathlib.Path(sys.argv[1]) / "ids.pt")
for folder in map(pathlib.Path, sys.argv[2:]):
    model, report = AutoModelForCausalLM.from_pretrained(folder / "plain", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], (folder, report)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped product refuses these odd sizes
    torch.save(model.eval()(ids).logits.detach(), folder / "logits.pt")
assert "fracbit" not in sys.modules
"""


def quantized(model: PreTrainedModel, folder: Path, **recipe: Any) -> Path:
    """A model and its fracbit checkpoint, both saved below `folder`; the path of the latter."""
    model.save_pretrained(folder / "float")
    write_checkpoint(Recipe(model=str(folder / "float"), **({"scheme": INT} | recipe)), folder / "q")
    return folder / "q"


def json_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every family: float, quantized, exported, and what transformers alone predicts from the last."""
    base = tmp_path_factory.mktemp("exported")
    torch.save(tokens(), base / "ids.pt")
    for name in FAMILIES:
        done = quantized(model_of(name), base / name, embeddings=Scheme("int", 8, 32))
        export(done, base / name / "plain", "float")
    folders = [str(base / name) for name in FAMILIES]
    reader = subprocess.run(
        [sys.executable, "-c", READER, str(base), *folders], capture_output=True, text=True, check=False
    )
    assert reader.returncode == 0, reader.stderr
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_alone_predicts_the_same(name: str, exported: Path) -> None:
    folder = exported / name
    expected, found = logits(load(folder / "q"), tokens()), torch.load(folder / "logits.pt")
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())
    assert json_of(folder / "plain") == with_old_keys(json_of(folder / "float"))
    assert not (folder / "plain" / JOURNAL).exists()


@pytest.mark.parametrize("tied", [True, False])
def test_what_stayed_float_is_copied_and_a_tied_head_stays_tied(
    tied: bool, tiny_llama: Maker, tmp_path: Path
) -> None:
    kept = Override(layers="*.1.mlp.up_proj", keep=True)
    quantized(tiny_llama(tie_word_embeddings=tied).to(torch.bfloat16), tmp_path, overrides=(kept,))
    (tmp_path / "q" / "tokenizer.json").write_text("{}")
    export(tmp_path / "q", tmp_path / "plain", "float")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("float", "plain"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) == (not tied)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= same
    assert "model.layers.0.mlp.up_proj.weight" not in same
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}, "the type of the source"
    assert (tmp_path / "plain" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("format_", ["float", "gptq", "awq", "compressed-tensors", "mlx"])
def test_programs_of_before_transformers_5_find_how_positions_turn(
    format_: str, tiny_llama: Maker, tmp_path: Path
) -> None:
    """Without the older keys they take a base of their own; what a config says already stays."""
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    model = tiny_llama(hidden_size=64, intermediate_size=96, rope_parameters=rope)
    done = quantized(
        model, tmp_path, scheme=Scheme("int:step", 4, 32, offset="float" if format_ == "mlx" else "zero")
    )
    export(done, tmp_path / "plain", format_)
    config = json_of(tmp_path / "plain")
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    found = AutoConfig.from_pretrained(tmp_path / "plain").rope_parameters
    assert found == rope, "transformers 5 reads both"
    assert with_old_keys(config) == config
    layered = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    inner = with_old_keys({"text_config": {"rope_parameters": layered}})["text_config"]
    assert (inner["rope_theta"], inner["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in inner


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_the_type_can_be_chosen(asked: str, dtype: str, tiny_llama: Maker, tmp_path: Path) -> None:
    quantized(tiny_llama().to(torch.bfloat16), tmp_path)
    export(tmp_path / "q", tmp_path / "plain", f"float:{asked}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    stored = load_file(tmp_path / "plain" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    exact = load(tmp_path / "q").model.layers[0].mlp.up_proj
    assert torch.equal(stored, decode(exact.packed, getattr(torch, dtype)))


def test_several_shards_are_resumed(
    tiny_llama: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(tiny_llama(), tmp_path)
    done = export(tmp_path / "q", tmp_path / "one", "float")
    assert done.bytes == (tmp_path / "one" / "model.safetensors").stat().st_size
    monkeypatch.setattr(pieces, "SHARD_BYTES", 100_000)

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        export(tmp_path / "q", tmp_path / "plain", "float", progress=stop)
    assert not (tmp_path / "plain" / "config.json").exists(), "an unfinished folder does not load"
    with pytest.raises(FormatError, match="unfinished"):
        load(tmp_path / "plain")
    with pytest.raises(OutputError, match="--resume"):
        export(tmp_path / "q", tmp_path / "plain", "float")
    with pytest.raises(OutputError, match="another recipe or source"):
        export(tmp_path / "q", tmp_path / "plain", "float:bf16", resume=True)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "plain").glob("*.safetensors")}
    seen: list[tuple[int, int]] = []
    export(
        tmp_path / "q", tmp_path / "plain", "float", resume=True, progress=lambda what, done, total: seen.append((done, total))
    )  # fmt: skip
    assert finished
    assert all((tmp_path / "plain" / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert seen[-1][0] == seen[-1][1]
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "plain"))
    assert torch.equal(logits(one), logits(many))
    export(tmp_path / "q", tmp_path / "plain", "float", overwrite=True)


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ({"rotation": "hadamard"}, "without the transform rotate-mlp"),
        ({"inputs": {"dtype": "int", "bits": 8, "scope": "token"}}, "quantize without inputs"),
    ],
)
def test_what_happens_while_a_model_runs_is_refused_by_name(
    entry: dict[str, object], remedy: str, tiny_llama: Maker, tmp_path: Path
) -> None:
    quantized(tiny_llama(), tmp_path)
    config = json_of(tmp_path / "q")
    for name, layer in config["quantization_config"]["layers"].items():
        if name.endswith("down_proj"):
            layer |= entry
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=rf"model\.layers\.0\.mlp\.down_proj.*while the model runs.*{remedy}"
    ):
        export(tmp_path / "q", tmp_path / "plain", "float")
    assert not (tmp_path / "plain").exists()


def test_wrong_inputs_are_answered(tiny_llama: Maker, tmp_path: Path) -> None:
    quantized(tiny_llama(), tmp_path)
    with pytest.raises(RecipeError, match="unknown export format 'flot'; did you mean 'float'"):
        export(tmp_path / "q", tmp_path / "plain", "flot")
    with pytest.raises(RecipeError, match=r"no type 'int8'.*float:fp32"):
        export(tmp_path / "q", tmp_path / "plain", "float:int8")
    with pytest.raises(FormatError, match="is not a fracbit checkpoint"):
        export(tmp_path / "float", tmp_path / "plain", "float")
    with pytest.raises(OutputError, match="the model itself"):
        export(tmp_path / "q", tmp_path / "q", "float", overwrite=True)
    assert not (tmp_path / "plain").exists()
    assert json_of(tmp_path / "q")["quantization_config"]["format_version"] == FORMAT_VERSION


def test_a_weight_that_fp16_cannot_hold_is_refused(tiny_llama: Maker, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e6
    quantized(model, tmp_path, scheme=Scheme("int", 8, 32, scale="fp32"))
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj.*float:fp32"):
        export(tmp_path / "q", tmp_path / "plain", "float:fp16")
    fracbit.export(tmp_path / "q", tmp_path / "other", "float:bf16")


def test_a_checkpoint_that_lacks_tensors_is_refused(tiny_llama: Maker, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    quantized(tiny_llama(), tmp_path)
    shutil.copytree(tmp_path / "q", tmp_path / "less")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 1 tensors.*layers\.1\.input_layernorm"):
        export(tmp_path / "less", tmp_path / "plain", "float")
