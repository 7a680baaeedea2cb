"""A run end to end: every family, tied and quantized embeddings, resume after SIGKILL, and each bad input."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import fracbit
from fracbit.checkpoint import output as output_module
from fracbit.checkpoint.load import load
from fracbit.checkpoint.summary import summarize
from fracbit.errors import FormatError, OutputError, RecipeError, SchemeError, SourceError, WeightError
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead
from fracbit.numerics import decode, quantize_tensor
from fracbit.pipeline.quantize.run import FINISHED, write_checkpoint
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import Killed, contents, logits, manifest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]


@pytest.fixture
def source(tiny_llama: Maker, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "float"


def test_the_layers_hold_what_quantize_tensor_gives(source: Path, tmp_path: Path) -> None:
    scheme = Scheme("nf", 3, 32, "out", scale="int8:16")
    result = write_checkpoint(Recipe(model=str(source), scheme=scheme), tmp_path / "q")
    model, reference = load(tmp_path / "q"), load(source)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            packed = quantize_tensor(module.weight.detach(), scheme)
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert torch.equal(decode(layer.packed), decode(packed))
            module.weight.data = decode(packed)
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    summary = summarize(str(tmp_path / "q"))
    assert summary["bits_per_weight"] == result.bits_per_weight
    assert (tmp_path / "q" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_bytes_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    result = write_checkpoint(Recipe(model=str(source)), tmp_path / "q", shard_bytes=20_000)
    shards = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(shards) > 2
    assert result.bytes == sum(path.stat().st_size for path in shards)
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert result.bits_per_parameter == pytest.approx(
        8 * sum(t.nbytes for t in tensors.values()) / sum(p.numel() for p in load(source).parameters())
    )
    found = manifest(tmp_path / "q")
    assert len(found["layers"]) == 7 * 3 + 2
    assert all(layer["reason"] for layer in found["layers"].values())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_whoever_may_read_the_folder_may_read_its_files(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    folder.chmod(0o755)
    write_checkpoint(Recipe(model=str(source)), folder)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        path.name: "0o644" for path in folder.iterdir()
    }
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_embeddings_and_head(tiny_llama: Maker, tmp_path: Path, tied: bool, axis: str) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    scheme = Scheme("int", 8, 32, axis)  # type: ignore[arg-type]
    recipe = Recipe(model=str(tmp_path / "float"), embeddings=scheme, head=None if tied else scheme)
    result = write_checkpoint(recipe, tmp_path / "q")
    model = load(tmp_path / "q")
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.lm_head, TiedHead if tied else QuantLinear)
    assert any("one tensor" in note for note in result.notes) == tied
    assert torch.allclose(
        logits(model), logits(_decoded(model, tiny_llama(tie_word_embeddings=tied))), atol=1e-5
    )
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "q" / "model.safetensors").keys()
    )
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_tied_table_under_the_heads_name_only(tiny_llama: Maker, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    write_checkpoint(Recipe(model=str(tmp_path / "float"), embeddings=Scheme("int", 8, 32)), tmp_path / "q")
    model = load(tmp_path / "q")
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.lm_head, TiedHead)


@pytest.mark.parametrize("tied", [False, True])
def test_a_cast_leaves_the_stored_bytes_alone(tiny_llama: Maker, tmp_path: Path, tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    write_checkpoint(
        Recipe(model=str(tmp_path / "float"), embeddings=Scheme("int", 8, 32), scheme=Scheme("nf", 4, 32)),
        tmp_path / "q",
    )
    model = load(tmp_path / "q")
    before = logits(model)
    scales = model.model.layers[0].mlp.up_proj.weight_scales.clone()
    model.to(torch.bfloat16)
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_scales, scales)
    assert torch.allclose(found.float(), before, atol=0.05)


def _decoded(model: torch.nn.Module, like: LlamaForCausalLM) -> LlamaForCausalLM:
    """`like` with every packed weight of `model` decoded into it."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            like.get_submodule(name).weight.data = decode(module.packed)
    return like


def test_overrides(source: Path, tmp_path: Path) -> None:
    overrides = (
        Override(layers="*.down_proj", scheme=Scheme("int", 8, "row")),
        Override(layers="model.layers.2.*", keep=True),
    )
    write_checkpoint(Recipe(model=str(source), scheme=Scheme("nf", 4), overrides=overrides), tmp_path / "q")
    model = load(tmp_path / "q")
    assert str(model.model.layers[0].mlp.down_proj.scheme) == "int8/row"
    assert str(model.model.layers[0].mlp.up_proj.scheme) == "nf4/64"
    assert isinstance(model.model.layers[2].mlp.down_proj, torch.nn.Linear)
    with pytest.raises(RecipeError, match="matches no layer"):
        write_checkpoint(
            Recipe(model=str(source), overrides=(Override(layers="*.dwn_proj", keep=True),)), tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_everything_kept_is_a_copy(source: Path, tmp_path: Path) -> None:
    result = write_checkpoint(
        Recipe(model=str(source), overrides=(Override(layers="*", keep=True),)), tmp_path / "q"
    )
    assert result.bits_per_weight is None
    assert torch.equal(logits(load(tmp_path / "q")), logits(load(source)))


# ---- faults --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from fracbit.pipeline.quantize.run import FINISHED, write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
print("ready", flush=True)
slow = lambda what, done, total: time.sleep(float(sys.argv[4]))
recipe = Recipe(model=sys.argv[1], scheme=Scheme("nf", 3, 32))
write_checkpoint(recipe, sys.argv[2], resume=sys.argv[3] == "resume", shard_bytes=20_000, progress=slow)
"""


def child(source: Path, target: Path, how: str, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(target), how, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _wait_for_a_shard(process: subprocess.Popen[str], folder: Path, attempt: int) -> bool:
    """Until the run has finished one shard more than it found; at once for the first. False when the run has ended."""
    begun = len(list((folder / ".fracbit").glob("model-*.json")))
    while attempt and process.poll() is None:
        if len(list((folder / ".fracbit").glob("model-*.json"))) > begun:
            return True
        time.sleep(0.005)
    return process.poll() is None


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_checkpoint(Recipe(model=str(source), scheme=Scheme("nf", 3, 32)), whole, shard_bytes=20_000)
    kills = 0
    for attempt in range(6):
        process = child(source, cut, "resume", 0.05)
        assert process.stdout is not None
        process.stdout.readline()
        if not _wait_for_a_shard(process, cut, attempt):
            process.communicate()
            break
        time.sleep(0.03 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if (cut / "config.json").exists() and not (cut / ".fracbit").exists():
            break
        with pytest.raises((FormatError, SourceError)):
            load(cut)
    assert kills >= 3
    if not (cut / "config.json").exists() or (cut / ".fracbit").exists():
        process = child(source, cut, "resume", 0)
        process.communicate()
        assert process.returncode == 0
    assert contents(cut) == contents(whole)


def test_a_kill_between_any_two_writes_is_resumable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename in turn is the last thing that happens; what is found then is resumable or complete."""
    recipe = Recipe(model=str(source), scheme=Scheme("nf", 3, 32))
    write_checkpoint(recipe, tmp_path / "whole", shard_bytes=20_000)
    real = os.replace

    for limit in range(100):
        folder, calls = tmp_path / f"cut{limit}", 0

        def replace(a: str, b: str, limit: int = limit) -> None:
            nonlocal calls
            if calls == limit:
                raise Killed
            calls += 1
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(output_module.os, "replace", replace)
            try:
                write_checkpoint(recipe, folder, shard_bytes=20_000)
                break
            except Killed:
                pass
        assert not (folder / "config.json").exists()
        write_checkpoint(recipe, folder, shard_bytes=20_000, resume=True)
        assert contents(folder) == contents(tmp_path / "whole")
    assert limit > 10


def test_a_full_disk_is_said_and_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(model=str(source))
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(output_module, "save_file", full)
        with pytest.raises(OutputError, match=r"disk is full.*--resume"):
            write_checkpoint(recipe, tmp_path / "q")
    write_checkpoint(recipe, tmp_path / "q", resume=True)
    load(tmp_path / "q")


def test_a_disk_that_cannot_hold_it_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="free"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_an_output_that_another_run_empties_meanwhile_is_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files and its journal go between the look at the folder and the look at them."""
    recipe, measure = Recipe(model=str(source)), Path.is_file
    write_checkpoint(recipe, tmp_path / "whole")
    write_checkpoint(recipe, tmp_path / "q")

    def vanish(path: Path) -> bool:
        found = measure(path)
        if path.parent == tmp_path / "q" and path.name == "README.md":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", vanish)
    assert output_module._written(tmp_path / "q") > 0
    assert output_module._written(tmp_path / "q" / "gone") == 0
    monkeypatch.undo()
    write_checkpoint(recipe, tmp_path / "q", overwrite=True)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_what_is_in_the_way(source: Path, tmp_path: Path) -> None:
    recipe, folder = Recipe(model=str(source)), tmp_path / "q"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="not empty"):
            write_checkpoint(recipe, folder, **how)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]
    first = write_checkpoint(recipe, tmp_path / "r")
    with pytest.raises(OutputError, match="--overwrite"):
        write_checkpoint(recipe, tmp_path / "r")
    before = contents(tmp_path / "r")
    again = write_checkpoint(recipe, tmp_path / "r", resume=True)
    assert (again.notes, again.bits_per_weight) == ((FINISHED,), first.bits_per_weight)
    assert contents(tmp_path / "r") == before
    with pytest.raises(OutputError, match="finished output of another recipe"):
        write_checkpoint(recipe.model_copy(update={"seed": 1}), tmp_path / "r", resume=True)
    write_checkpoint(recipe.model_copy(update={"scheme": Scheme(bits=3)}), tmp_path / "r", overwrite=True)
    with pytest.raises(OutputError, match="model itself"):
        write_checkpoint(recipe, source, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        write_checkpoint(recipe, folder / "letter.txt")


def test_another_runs_journal_is_not_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "fracbit.pipeline.quantize.run.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    with pytest.raises(OutputError, match="another recipe"):
        write_checkpoint(Recipe(model=str(source), scheme=Scheme(bits=3)), tmp_path / "q", resume=True)
    with pytest.raises(FormatError, match="unfinished"):
        load(tmp_path / "q")
    write_checkpoint(Recipe(model=str(source), scheme=Scheme(bits=3)), tmp_path / "q", overwrite=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_names_its_layer(source: Path, tmp_path: Path, bad: float) -> None:
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"layer model\.layers\.1\.mlp\.up_proj: 1 of .* NaN or Inf"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    assert not (tmp_path / "q" / "config.json").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_stays_float_is_looked_at_too(source: Path, tmp_path: Path, name: str) -> None:
    state = load_file(source / "model.safetensors")
    state[name].view(-1)[3] = float("nan")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=f"tensor {name}: 1 of .* NaN or Inf"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")


def test_a_tensor_of_no_module_is_copied_whatever_it_holds(source: Path, tmp_path: Path) -> None:
    state = load_file(source / "model.safetensors") | {"mask": torch.tensor(float("-inf"))}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    assert load_file(tmp_path / "q" / "model.safetensors")["mask"] == float("-inf")


def test_what_needs_data_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gptq reads calibration data: give"):
        write_checkpoint(Recipe(model=str(source), quantizer="gptq"), tmp_path / "q")
    with pytest.raises(RecipeError, match="chosen by activation read calibration data"):
        write_checkpoint(Recipe(model=str(source), outliers="activation:0.1"), tmp_path / "q")
    with pytest.raises(RecipeError, match="needs calibration"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q", device="meta")
    assert not (tmp_path / "q").exists()


def test_broken_configs_of_a_source(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": "x"}))
    with pytest.raises(SourceError, match="already quantized"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    (source / "model.safetensors").unlink()
    for index in ({"weight_map": []}, {"weight_map": {"a": 3}}, {}):
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SourceError, match="weight_map"):
            write_checkpoint(Recipe(model=str(source)), tmp_path / "q")


def test_overwriting_can_be_killed_at_any_removal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a half-removed output nor records without their plan are taken for something else."""
    first, second = (Recipe(model=str(source), scheme=Scheme("nf", bits, 32)) for bits in (4, 3))
    write_checkpoint(second, tmp_path / "whole", shard_bytes=60_000)
    real = Path.unlink

    for limit in range(100):
        folder, calls = tmp_path / f"cut{limit}", 0
        write_checkpoint(first, folder, shard_bytes=60_000)

        def unlink(path: Path, missing_ok: bool = False, limit: int = limit, folder: Path = folder) -> None:
            nonlocal calls
            if path.exists() and calls == limit:
                raise Killed
            calls += path.exists()
            real(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                write_checkpoint(second, folder, overwrite=True, shard_bytes=60_000)
                break
            except Killed:
                pass
        assert (folder / ".fracbit").is_dir()
        if not (folder / ".fracbit" / "plan.json").exists():
            assert not list((folder / ".fracbit").iterdir())
        write_checkpoint(second, folder, resume=True, shard_bytes=60_000)
        if limit > 2:  # an early kill leaves files of the first output, which the second one writes anew
            assert contents(folder) == contents(tmp_path / "whole")
    assert limit > 10


def test_models_that_cannot_be_quantized(source: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(SourceError, match="holds a BertModel, which lacks 6 tensors of a BertLMHeadModel"):
        write_checkpoint(Recipe(model=str(tmp_path / "bert")), tmp_path / "q")
    write_checkpoint(Recipe(model=str(source)), tmp_path / "once")
    with pytest.raises(SourceError, match="already quantized"):
        write_checkpoint(Recipe(model=str(tmp_path / "once")), tmp_path / "twice")
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(SourceError, match="not a model that transformers knows"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}})
    )
    with pytest.raises(SourceError, match="--trust-remote-code"):
        write_checkpoint(Recipe(model=str(source)), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_bad_schemes_touch_nothing(source: Path, tmp_path: Path) -> None:
    for scheme, says in [
        (Scheme("nff", 4), "did you mean 'nf'"),
        (Scheme("int", 1), "1-bit int"),
        (Scheme("kmeans", 4, offset="zero"), "offset float or none"),
        (Scheme("float:e9m9", 4), "not a split of 4 bits"),
        (Scheme("power:x", 4), "no number"),
    ]:
        with pytest.raises(SchemeError, match=says):
            write_checkpoint(Recipe(model=str(source), scheme=scheme), tmp_path / "q")
    with pytest.raises(RecipeError, match="unknown quantizer"):
        write_checkpoint(Recipe(model=str(source), quantizer="gptk"), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_the_api(source: Path, tmp_path: Path) -> None:
    result = fracbit.quantize(source, tmp_path / "q", Scheme("nf", 4, 64))
    assert result.bits_per_weight == pytest.approx(4.25, abs=0.2)
    assert isinstance(fracbit.load(tmp_path / "q").model.layers[0].mlp.up_proj, QuantLinear)
