"""Runs for an engine: only what it serves, on its own grid, and a file without rounding at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fracbit
from fracbit.checkpoint.export.exporter import FORMATS
from fracbit.checkpoint.export.one_file import partial_of
from fracbit.checkpoint.format import StoredLayer
from fracbit.cli import app
from fracbit.engines.engine import ENGINES
from fracbit.errors import FormatError, FracbitError, OutputError, RecipeError
from fracbit.pipeline.plan.target import for_engine, target_of
from fracbit.pipeline.quantize.run import open_for
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme, parse_scheme
from fracbit.records.spending import Spending
from fracbit.records.tables import FILES_ONLY, SERVING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from families import tiny_llama

    folder = tmp_path_factory.mktemp("float")
    tiny_llama(
        hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16
    ).bfloat16().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()
    }


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize(
    "spending", [Spending(), Spending(average_bits=5.6), Spending(preset="fast", average_bits=6)], ids=str
)
def test_a_run_ends_in_the_file_of_the_engine(
    name: str, spending: Spending, model: Path, tmp_path: Path
) -> None:
    """The same as a run with the schemes that it chose, and an export without `requantize`."""
    from dataclasses import replace

    terms = replace(spending, engine=name)
    found = fracbit.quantize(model, tmp_path / "out", spending=terms, progress=None)
    assert found.output == str(tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()
    manifest = json.loads((tmp_path / "out" / "fracbit.json").read_text())
    assert manifest["exported"] == ENGINES[name].formats[0]
    assert manifest["requantized"] == {}
    recipe = Recipe.model_validate(manifest["recipe"])
    fracbit.quantize(recipe, tmp_path / "q", progress=None)
    fracbit.export(tmp_path / "q", tmp_path / "same", ENGINES[name].formats[0], progress=None)
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "same")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[each], two[each]) for each in one)
    schemes = {
        each: Scheme.from_json(layer["scheme"])
        for each, layer in manifest["layers"].items()
        if layer["scheme"]
    }
    forms = target_of(name, open_for(recipe)).forms
    assert all(not forms.nearest(StoredLayer(scheme, (64, 192))).reason for scheme in schemes.values())
    if spending.average_bits is not None and found.bits_per_weight is not None:
        assert found.bits_per_weight <= spending.average_bits + 1e-9


@pytest.mark.parametrize("name", [name for name in SERVING if ENGINES[name].fused])
def test_linears_that_an_engine_fuses_have_one_scheme(name: str, model: Path) -> None:
    found = fracbit.plan(model, Spending(average_bits=5.0, engine=name), progress=None)
    for block in (0, 1):
        for group in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            schemes = {found.spelled_out.schemes[f"model.layers.{block}.{linear}"] for linear in group}
            assert len(schemes) == 1
    assert len(set(found.spelled_out.schemes.values())) > 1, "there was something to choose"


def test_what_was_asked_for_and_is_not_served_is_said(model: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(model),
        scheme="nf3/48",
        overrides=(Override(layers="*.down_proj", scheme=parse_scheme("int2z/64")),),
    )
    made = fracbit.quantize(recipe, tmp_path / "out", spending=Spending(engine="vllm-cpu"), progress=None)
    assert made.notes[:2] == (
        "nf3/48 became int:step4/32 s=bf16 or int:step4/48 s=bf16, the nearest schemes that vllm-cpu serves",
        "int2z/64 became int:step4z/64 s=bf16, the nearest scheme that vllm-cpu serves",
    )
    exact = Recipe(model=str(model), scheme="int:step4/32 s=bf16")
    assert (
        fracbit.quantize(exact, tmp_path / "exact", spending=Spending(engine="vllm-cpu"), progress=None).notes
        == ()
    )


def test_linears_that_an_engine_cannot_have_stay_float(tiny_llama: Maker, tmp_path: Path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=80, num_attention_heads=4, head_dim=16).save_pretrained(
        tmp_path / "m"
    )
    made = fracbit.quantize(
        tmp_path / "m", tmp_path / "out", spending=Spending(engine="mlx"), progress=None, allow_float=1
    )
    stayed = [note for note in made.notes if "stays float" in note]
    assert stayed == [
        f"model.layers.{block}.mlp.down_proj stays float: no block of the format divides its 80 inputs"
        for block in (0, 1, 2)
    ]
    assert tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].is_floating_point()


def refused(model: Path) -> Iterable[tuple[Recipe, str, str]]:
    base: dict[str, Any] = {"model": str(model)}
    text = {"texts": ("t.txt",)}
    yield Recipe(**base, outliers="cost:0.02"), "vllm-cpu", "serves no 16-bit columns"
    yield Recipe(**base, embeddings="int8/64"), "vllm-cpu", "embedding tables as floats"
    yield Recipe(**base, head="int8/64"), "vllm-cpu", "output head as floats"
    yield (
        Recipe(**base, calibration=Calibration(**text, inputs="int8")),
        "mlx",
        "leave calibration.inputs out",
    )
    yield (
        Recipe(**base, calibration=Calibration(**text, transforms=("rotate-mlp",))),
        "mlx",
        "leave the transform out that turns them",
    )
    yield Recipe(**base, calibration=Calibration(**text, axis="nearest")), "mlx", "leave calibration.axis out"


def test_what_no_file_of_an_engine_holds_is_refused(model: Path) -> None:
    for recipe, name, message in refused(model):
        with pytest.raises(RecipeError, match=message):
            for_engine(recipe, Spending(engine=name), open_for(recipe), own=recipe)


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    how = {"spending": Spending(engine="vllm-cpu"), "shard_bytes": 1 << 14}
    out = tmp_path / "out"
    with pytest.raises(Stop):
        fracbit.quantize(model, out, progress=stop, **how)  # type: ignore[arg-type]
    assert partial_of(out).is_dir()
    assert not (out / "config.json").exists()
    with pytest.raises(
        OutputError, match=r"out.partial is a run that did not end; use --resume.*--overwrite"
    ):
        fracbit.quantize(model, out, progress=None, **how)  # type: ignore[arg-type]
    fracbit.quantize(model, out, resume=True, progress=None, **how)  # type: ignore[arg-type]
    fracbit.quantize(model, tmp_path / "whole", progress=None, **how)  # type: ignore[arg-type]
    one, two = tensors(out), tensors(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    with pytest.raises(OutputError, match="is finished: there is nothing to resume"):
        fracbit.quantize(model, out, resume=True, progress=None, **how)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="is not empty"):
        fracbit.quantize(model, out, progress=None, **how)  # type: ignore[arg-type]
    fracbit.quantize(model, out, overwrite=True, progress=None, **how)  # type: ignore[arg-type]


def test_what_only_the_format_refuses_is_refused_before_the_run(model: Path, tmp_path: Path) -> None:
    """mlx-lm joins the experts of a mixture; llama.cpp knows no such family."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_local_experts": 2,
    }
    config = MixtralConfig(
        vocab_size=96, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, **sizes
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(FormatError, match="mlx-lm joins or turns weights of MixtralForCausalLM"):
        fracbit.quantize(
            tmp_path / "mixtral", tmp_path / "out", spending=Spending(engine="mlx"), progress=None
        )
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(OutputError, match="is the root of a disk"):
        fracbit.quantize(model, "/", spending=Spending(engine="mlx"), progress=None)


def test_a_table_that_an_engine_cannot_have_stays_float_or_is_refused(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
    }
    OPTForCausalLM(OPTConfig(vocab_size=96, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "m"
    )
    made = fracbit.quantize(
        tmp_path / "m", tmp_path / "out", spending=Spending(engine="mlx"), progress=None, allow_float=1
    )
    assert made.output == str(tmp_path / "out")
    assert tensors(tmp_path / "out")["model.decoder.embed_tokens.weight"].is_floating_point()
    asked = Recipe(model=str(tmp_path / "m"), embeddings="int8/32")
    with pytest.raises(
        RecipeError,
        match="these embedding tables in int8/32: no block of the format divides its 24",
    ):
        for_engine(asked, Spending(engine="mlx"), open_for(asked), own=asked)


@pytest.mark.parametrize("override", [{"keep": True}, {"scheme": parse_scheme("int4/32")}])
def test_overrides_do_not_split_what_an_engine_fuses(override: dict[str, Any], model: Path) -> None:
    one = Recipe(model=str(model), overrides=(Override(layers="*.0.self_attn.q_proj", **override),))
    with pytest.raises(
        RecipeError, match=r"0\.self_attn\.q_proj, .*k_proj, .*v_proj are one layer in vllm-cpu"
    ):
        for_engine(one, Spending(engine="vllm-cpu"), open_for(one), own=one)
    for_engine(one, Spending(engine="mlx"), open_for(one), own=one)
    every = Recipe(model=str(model), overrides=(Override(layers="*.0.self_attn.[qkv]_proj", **override),))
    for_engine(every, Spending(engine="vllm-cpu"), open_for(every), own=every)


def test_a_run_that_was_killed_before_it_removed_its_checkpoint_ends_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fracbit.pipeline.quantize import served

    class Killed(Exception):
        pass

    def killed(path: Path) -> None:
        raise Killed

    how: dict[str, Any] = {"spending": Spending(engine="vllm-cpu"), "progress": None}
    monkeypatch.setattr(served.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        fracbit.quantize(model, tmp_path / "out", **how)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made = fracbit.quantize(model, tmp_path / "out", resume=True, **how)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert not partial_of(tmp_path / "out").exists()
    assert made.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_resumed_run_does_not_discard_that_of_another_recipe(model: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        fracbit.quantize(model, tmp_path / "out", spending=Spending(engine="vllm-cpu"), progress=stop)
    other = Recipe(model=str(model), scheme="int:step4/64 s=bf16")
    with pytest.raises(OutputError, match="was begun with another recipe or source"):
        fracbit.quantize(
            other, tmp_path / "out", spending=Spending(engine="vllm-cpu"), resume=True, progress=None
        )


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["quantize", str(model), "--for", "mlx", "-o", str(tmp_path / "out"), "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4
    ran = CliRunner().invoke(app, ["plan", str(model), "--for", "vllm-cpu", "--average-bits", "6", "--json"])
    assert ran.exit_code == 0, ran.output
    chosen = json.loads(ran.stdout)["allocation"]["schemes"]
    assert {one and one["dtype"] for one in chosen} == {"int:step", None}
    found = CliRunner().invoke(app, ["quantize", str(model), "--for", "mlxx", "-o", str(tmp_path / "x")])
    assert isinstance(found.exception, FracbitError)
    assert "did you mean 'mlx'" in str(found.exception)


def test_the_help_names_the_engines_that_serve_something() -> None:
    served = {name: engine.formats[0] for name, engine in ENGINES.items() if engine.serves is not None}
    assert list(SERVING.items()) == list(served.items())
    assert {*SERVING, *FILES_ONLY} == set(ENGINES)
    ran = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "200"})
    assert f"Engine that will run the file: {', '.join(SERVING)}." in ran.output
    assert "gptqmodel" not in ran.output


@pytest.mark.parametrize("name", SERVING)
def test_every_engine_serves_a_part_of_what_its_format_holds(name: str) -> None:
    engine = ENGINES[name]
    exporter = FORMATS[engine.formats[0]]("")
    for bits in range(1, 9):
        for word in (f"int{bits}z/64", f"int{bits}f/32 s=fp32", f"kmeans{bits}/row"):
            assert engine.serves is not None
            near = engine.serves.nearest(StoredLayer(parse_scheme(word), (64, 192)))
            assert isinstance(near.scheme, Scheme)
            assert not exporter.nearest(StoredLayer(near.scheme, (64, 192))).reason


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths, 64 and 256, have different types in llama.cpp."""
    from families import tiny_llama

    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 16}
    tiny_llama(**sizes).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("preset", [None, "fast"])
def test_a_size_is_that_of_the_file_of_the_engine(
    name: str, preset: str | None, wide: Path, tmp_path: Path
) -> None:
    """Tokenizer, names and places counted."""
    whole = fracbit.quantize(wide, tmp_path / "whole", spending=Spending(engine=name), progress=None).bytes
    terms = Spending(size=str(round(1.2 * whole)), engine=name, preset=preset)
    made = fracbit.quantize(wide, tmp_path / "made", spending=terms, progress=None)
    assert 0.8 * whole < made.bytes <= 1.2 * whole


def test_every_linear_gets_what_its_width_allows(wide: Path) -> None:
    """One scheme for all becomes the nearest of every shape; a budget offers each linear its own levels."""
    recipe = Recipe(model=str(wide), scheme="int2z/64")
    found = for_engine(recipe, Spending(engine="llama.cpp"), open_for(recipe), own=recipe)
    assert found.recipe.scheme == parse_scheme("int:step4f/32")
    assert {each.layers.rpartition(".")[2]: str(each.scheme) for each in found.recipe.overrides} == {
        "down_proj": "int:step2f/16 s=int:up4:16"
    }
    assert found.notes == (
        "int2z/64 became int:step4f/32 or int:step2f/16 s=int:up4:16, the nearest schemes that llama.cpp serves",
    )
    plan = fracbit.plan(wide, Spending(average_bits=4.2, engine="llama.cpp"), progress=None)
    schemes = plan.spelled_out.schemes
    assert all(
        isinstance(one, Scheme) and one.bits > 3 for name, one in schemes.items() if "down" not in name
    )
    assert any(one is not None and one.bits < 4 for one in schemes.values()), (
        "4.2 bits are below the least of 64"
    )
    assert {one.scale for one in schemes.values() if one} > {"fp16"}
