"""Laws of `tweak` and `refine` over the formats of other programs: what moves, what stays, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import fracbit
from families import CONFIGS, tiny_llama
from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.patched import PatchedCopy
from fracbit.checkpoint.repacked import movable_layer
from fracbit.checkpoint.source import Source
from fracbit.cli import app
from fracbit.errors import DataError, FormatError, FracbitError, OutputError, RecipeError, SourceError
from fracbit.models.blocks import blocks, norms, pairs, weight_of
from fracbit.models.fold import fold_norm, fold_pair, tie
from fracbit.numerics import decode
from fracbit.pipeline.improve.alongside import rescale
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import parse_scheme
from outputs import Killed, contents, manifest
from rounded import change_tensors, rounded_groups, stream_of, two_folders
from texts import write_ids

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
INTEGERS = {
    "gptq 2": ("gptq", "int:step2z/32"),
    "gptq 3": ("gptq", "int:step3/64"),
    "gptq v1": ("gptq:v1", "int:step4/32 s=bf16"),
    "awq": ("awq", "int:step4z/32"),
    "compressed-tensors 2": ("compressed-tensors", "int:step2z/16 s=bf16"),
    "compressed-tensors 3": ("compressed-tensors", "int:step3/row"),
    "compressed-tensors 4": ("compressed-tensors", "int:step4/64"),
}
FOREIGN = INTEGERS | {"mlx": ("mlx", "int:step3f/32")}
NORMS = ("norm.weight", "layernorm.weight")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    tiny_llama(**SIZES).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ids(tmp_path_factory.mktemp("text") / "ids.u16", 40, 16)


@pytest.fixture(scope="module")
def foreign(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as another program leaves it: without our manifest, with files of its own."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("foreign")
            form, scheme = FOREIGN[name]
            fracbit.quantize(floats, place / "q", scheme, progress=None)
            export(place / "q", place / "made", form)
            (place / "made" / "fracbit.json").unlink()
            (place / "made" / "recipe.yaml").write_bytes(b"theirs:\r\n")
            config = json.loads((place / "made" / "config.json").read_text())
            (place / "made" / "config.json").write_bytes(json.dumps(config).encode() + b"\r\n")
            made[name] = place / "made"
        return made[name]

    return make


def how(text: str, **more: Any) -> dict[str, Any]:
    return {"calibration": text, "samples": 16, "length": 16, "progress": None, **more}


def changed(one: Path, other: Path) -> set[str]:
    """The tensors that differ; all else of both folders is equal, but for the manifest."""
    before, after = contents(one), contents(other)
    assert after.keys() - before.keys() == {"fracbit.json"}
    differ = {name for name in before if before[name] != after[name]}
    assert differ <= {"model.safetensors"}
    files = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    size = 8 + int.from_bytes(files[0][:8], "little")
    assert (len(files[0]), files[0][:size]) == (
        len(files[1]),
        files[1][:size],
    )  # headers: names, types, shapes, places
    old, new = (load_file(folder / "model.safetensors") for folder in (one, other))
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("name", INTEGERS)
def test_refining_moves_codes_and_scales_alone(
    name: str, floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    source = foreign(name)
    found = fracbit.refine(source, tmp_path / "better", against=floats, **how(text))
    moved = changed(source, tmp_path / "better")
    assert moved
    assert {each.rpartition(".")[2] for each in moved} <= {
        "qweight",
        "scales",
        "weight_packed",
        "weight_scale",
    }
    assert len(found.layers) == 21
    assert not found.notes
    assert all(layer.after <= layer.before for layer in found.layers.values())
    assert any(layer.after < layer.before for layer in found.layers.values())
    checked = fracbit.verify(tmp_path / "better", progress=None)
    assert (checked.faults, checked.hashed) == ((), True)
    assert manifest(tmp_path / "better")["improved"]["by"] == "refine"


@pytest.mark.parametrize("name", FOREIGN)
def test_tweaking_moves_norms_alone(
    name: str, floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    source = foreign(name)
    found = fracbit.tweak(source, tmp_path / "better", against=floats, method="closed", **how(text))
    assert all(each.endswith(NORMS) for each in changed(source, tmp_path / "better"))
    assert [tweak.kept for tweak in found.tweaks] == ["closed"] * 3


@pytest.mark.parametrize("method", ["adam", "auto", "adam:rate=5e-3", "predictions"])
def test_the_methods_of_tweaking(
    method: str, floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    source = foreign("gptq 2")
    found = fracbit.tweak(source, tmp_path / "better", against=floats, method=method, **how(text))
    assert all(each.endswith(NORMS) for each in changed(source, tmp_path / "better"))
    if method == "auto":
        assert all(tweak.after <= tweak.before for tweak in found.tweaks)
    if found.loss is not None:
        assert found.loss.after <= found.loss.before


def test_norms_learn_from_the_text_alone(text: str, foreign: Callable[[str], Path], tmp_path: Path) -> None:
    source = foreign("gptq 2")
    found = fracbit.tweak(source, tmp_path / "better", **how(text))
    assert found.loss is not None
    assert found.loss.after <= found.loss.before
    moved = changed(source, tmp_path / "better")
    assert all(each.endswith(NORMS) for each in moved)
    assert bool(moved) == (found.loss.epochs > 0)


@pytest.mark.parametrize("verb", ["tweak", "refine"])
def test_the_same_task_gives_the_same_bytes_also_after_a_kill(
    verb: str,
    floats: Path,
    text: str,
    foreign: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, run = foreign("gptq 3"), getattr(fracbit, verb)
    run(source, tmp_path / "one", against=floats, **how(text))
    with monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise Killed

        patch.setattr(PatchedCopy, "finish", killed)
        with pytest.raises(Killed):
            run(source, tmp_path / "two", against=floats, **how(text))
    assert not (tmp_path / "two" / "model.safetensors").exists()
    with pytest.raises(FormatError, match="unfinished"):
        fracbit.load(tmp_path / "two")
    run(source, tmp_path / "two", against=floats, **how(text, resume=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"intermediate_size": 96, "sliding_window": 5, "query_pre_attn_scalar": 16},
}
"""Weights as [in, out]; experts; gains that are stored without their 1."""


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, text: str, tmp_path: Path) -> None:
    import transformers

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}
    sizes = {} if family == "gpt2" else {"hidden_size": 64, "num_hidden_layers": 2, **heads}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, CONFIGS[family][0])(vocab_size=96, **sizes, **ids, **OTHERS[family])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
        tmp_path / "float"
    )
    fracbit.quantize(tmp_path / "float", tmp_path / "q", "int:step3z/32", progress=None)
    export(tmp_path / "q", tmp_path / "coded", "gptq", requantize=True)
    fine = fracbit.refine(tmp_path / "coded", tmp_path / "refined", against=tmp_path / "float", **how(text))
    assert all(layer.after < layer.before for layer in fine.layers.values())
    assert not [note for note in fine.notes if "stayed" in note]
    found = fracbit.tweak(tmp_path / "coded", tmp_path / "tweaked", against=tmp_path / "float", **how(text))
    assert all(tweak.after <= tweak.before for tweak in found.tweaks)
    fracbit.load(tmp_path / "tweaked")


def gptq_in_order(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ with inputs that are sorted into groups at random (act-order)."""
    layer = name.removesuffix(".weight")
    codes, scale, zero = rounded_groups(weight, 4, 32, asymmetric=True)
    index = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) // 32
    stored = {
        f"{layer}.qweight": stream_of(codes, 4).T, f"{layer}.qzeros": stream_of(zero.T, 4), f"{layer}.scales": scale.T,
        f"{layer}.g_idx": index.to(torch.int32),
    }  # fmt: skip
    return stored, ((codes - zero[:, index]) * scale.float()[:, index]).to(weight.dtype)


def decoded_layer(source: Source, name: str) -> Tensor:
    """The weight of a layer, in the order of its inputs."""
    layer = movable_layer(source, name)
    return decode(layer.packed)[:, layer.order.argsort()]


def test_group_indices_stay(text: str, tmp_path: Path) -> None:
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "checkpoint_format": "gptq_v2",
        "desc_act": True,
    }
    coded, plain = two_folders(tiny_llama(**SIZES), tmp_path, gptq_in_order, settings, dtype=torch.float16)
    weights = load_file(plain / "model.safetensors")
    found = fracbit.refine(coded, tmp_path / "better", against=plain, **how(text))
    moved = changed(coded, tmp_path / "better")
    assert all(each.endswith((".qweight", ".scales")) for each in moved)
    # They stand for the plain model's very weights, so that nothing is left to gain.
    assert all(layer.after <= layer.before < 1e-5 for layer in found.layers.values())
    source = open_float(coded).source
    for name in source.decodings:
        assert torch.equal(decoded_layer(source, name).to(weights[name].dtype), weights[name])


def test_a_float_block_takes_the_scaling_of_its_twin() -> None:
    """As AWQ folds it: into norms, and from rows of one linear into the columns of the next."""
    from fracbit.models.find import family_of

    plain, scaled = (tiny_llama(**SIZES, num_key_value_heads=2).float() for _ in range(2))
    family, generator = family_of(plain), torch.Generator().manual_seed(0)
    (_, block), (_, twin) = (blocks(model, family)[0] for model in (plain, scaled))
    for norm in norms(twin, family):
        fold_norm(twin, family, norm, torch.rand(64, generator=generator) + 0.5)
    for pair in pairs(twin, family, scaled.config):
        width = weight_of(twin.get_submodule(pair.readers[0])).shape[1]
        factors = tie(twin, pair, torch.rand(width, generator=generator) * 4 + 0.3, scaled.config)
        fold_pair(twin, pair, factors, scaled.config)
    with torch.no_grad():
        rescale(block, family, plain.config, twin.state_dict())
    for name, tensor in block.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], rtol=1e-4, atol=1e-6), name


def bad(name: str, floats: Path, text: str, source: Path, where: Path) -> tuple[Any, type[FracbitError], str]:
    """A call that must be refused, the error and what it says."""
    against = {"against": floats}
    other = where / "other"
    if name in ("wider", "other weights", "other kind"):
        from families import model_of

        model = (
            model_of("gpt2")
            if name == "other kind"
            else tiny_llama(**(SIZES | ({"vocab_size": 128} if name == "wider" else {})), seed=7)
        )
        model.save_pretrained(other)
    calls: dict[str, tuple[Any, type[FracbitError], str]] = {
        "float": (lambda: fracbit.refine(floats, where / "out", **how(text, **against)), SourceError, "not quantized"),
        "absent": (lambda: fracbit.tweak(where / "x", where / "out", **how(text)), SourceError, "no such model"),
        "wider": (lambda: fracbit.refine(source, where / "out", **how(text, against=other)), SourceError, r"\[128, 64\]"),
        "other weights": (
            lambda: fracbit.refine(source, where / "out", **how(text, against=other)), SourceError, "nothing like"
        ),
        "other kind": (
            lambda: fracbit.tweak(source, where / "out", **how(text, against=other)), SourceError, "llama .* gpt2"
        ),
        "coded target": (
            lambda: fracbit.refine(source, where / "out", **how(text, against=source)), SourceError, "quantized itself"
        ),
        "no text": (
            lambda: fracbit.tweak(source, where / "out", **how(f"{where}/no.u16?length=16", **against)), DataError, "no.u16"
        ),
        "method alone": (
            lambda: fracbit.tweak(source, where / "out", **how(text, method="adam")), RecipeError, "--against"
        ),
        "all codes": (
            lambda: fracbit.tweak(source, where / "out", **how(text, method="train", **against)), RecipeError, "more than norms"
        ),
        "unknown": (
            lambda: fracbit.tweak(source, where / "out", **how(text, method="atom", **against)), RecipeError, "adam"
        ),
        "one sample": (
            lambda: fracbit.tweak(source, where / "out", **how(text, **against) | {"samples": 1}), RecipeError, "2 samples"
        ),
        "itself": (lambda: fracbit.tweak(source, source, **how(text, **against)), OutputError, "not empty"),
    }  # fmt: skip
    return calls[name]


@pytest.mark.parametrize(
    "name",
    [
        "float", "absent", "wider", "other weights", "other kind", "coded target", "no text", "method alone", "all codes",
        "unknown", "one sample", "itself",
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_written(
    name: str, floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    source = foreign("gptq 3")
    before = contents(source)
    call, error, said = bad(name, floats, text, source, tmp_path)
    with pytest.raises(error, match=said):
        call()
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


def test_scaling_that_awq_folded_in_is_found(floats: Path, text: str, tmp_path: Path) -> None:
    scaled = Calibration(texts=(text,), samples=16, length=16, transforms=("awq",))
    recipe = Recipe(model=str(floats), scheme=parse_scheme("int:step4z/32"), calibration=scaled, search=False)
    fracbit.quantize(recipe, tmp_path / "q", progress=None)
    export(tmp_path / "q", tmp_path / "awq", "awq")
    gains = [
        load_file(folder / "model.safetensors")["model.layers.0.input_layernorm.weight"]
        for folder in (floats, tmp_path / "awq")
    ]
    assert not torch.allclose(gains[0].float(), gains[1].float(), rtol=0.02)
    found = fracbit.refine(tmp_path / "awq", tmp_path / "better", against=floats, **how(text))
    assert all(layer.after <= layer.before < 0.05 for layer in found.layers.values())


def test_formats_whose_codes_do_not_move_are_named(
    floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=r"MLX, 3 bits, and refine moves integers .*; fracbit tweak"):
        fracbit.refine(foreign("mlx"), tmp_path / "out", against=floats, **how(text))
    fracbit.quantize(floats, tmp_path / "own", "int4/32", progress=None)
    with pytest.raises(FormatError, match=r"a checkpoint of fracbit, .* --quantizer descent"):
        fracbit.tweak(tmp_path / "own", tmp_path / "out", against=floats, **how(text))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_cannot_be_written_back_stays_with_a_note(
    floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(foreign("gptq 2"), copy)

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.scales"][0, 0] *= -1

    change_tensors(copy, turn)
    found = fracbit.refine(copy, tmp_path / "better", against=floats, **how(text))
    assert found.notes == (
        "stayed as it was: it has scales that are no floats, or 0, or below 0 beside zero points "
        "(model.layers.0.mlp.up_proj)",
    )
    assert not any("0.mlp.up_proj" in name for name in changed(copy, tmp_path / "better"))


def test_what_was_done_before_is_kept(
    floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    fracbit.refine(foreign("awq"), tmp_path / "one", against=floats, **how(text))
    fracbit.tweak(tmp_path / "one", tmp_path / "two", against=floats, method="closed", **how(text))
    said = manifest(tmp_path / "two")["improved"]
    assert (said["by"], said["before"]["by"]) == ("tweak", "refine")
    assert not fracbit.verify(tmp_path / "two", progress=None).faults


def test_the_command_line(floats: Path, text: str, foreign: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["--calibration", text, "--samples", "8", "--length", "16", "--against", str(floats), "--json"]
    for verb in ("tweak", "refine"):
        done = CliRunner().invoke(app, [verb, str(foreign("awq")), "-o", str(tmp_path / verb), *words])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["output"] == str(tmp_path / verb)
    again = CliRunner().invoke(app, ["tweak", str(foreign("awq")), "-o", str(tmp_path / "tweak"), *words])
    assert isinstance(again.exception, OutputError)


@pytest.mark.slow
def test_a_real_model_of_2_bits_comes_closer_to_its_float_model(shared: Path, tmp_path: Path) -> None:
    model, seen, unseen = (
        shared / "models" / "tales-xs",
        f"{shared}/data/tales-calibration.u16?length=512&keep=128",
        f"{shared}/data/tales-evaluation.u16?length=512&keep=128&first=40",
    )
    fracbit.quantize(model, tmp_path / "q", "int:step2z/32", progress=None)
    export(tmp_path / "q", tmp_path / "gptq", "gptq", requantize=True)
    fracbit.refine(tmp_path / "gptq", tmp_path / "better", seen, model, samples=32, length=128, progress=None)
    kl = []
    for each in ("gptq", "better"):
        found = fracbit.evaluate(
            tmp_path / each, unseen, against=model, window=128, dtype="float32", progress=None
        )
        assert found.divergence is not None
        kl.append(found.divergence.kl)
    assert kl[1] < 0.9 * kl[0]
