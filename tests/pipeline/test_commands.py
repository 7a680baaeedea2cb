"""The commands of budgets and lenses, end to end on a tiny model: one JSON object each, files as asked, clear errors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from fracbit.cli import app
from fracbit.errors import FracbitError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny_llama().bfloat16().save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 96, (2, 20, 32)).astype("<u2")
    for name, rows in zip(("seen", "unseen"), ids, strict=True):
        rows.tofile(folder / f"{name}.u16")
    return folder


def command(*words: str) -> dict[str, object]:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def source(files: Path, name: str) -> str:
    return f"{files / name}.u16?length=32"


SAMPLES = ("--samples", "4", "--length", "32")


def test_scores_go_into_a_plan_and_the_plan_into_a_checkpoint(files: Path) -> None:
    pytest.importorskip("matplotlib")
    model, scores, plan = str(files / "model"), files / "scores.json", files / "plan.toml"
    found = command(
        "score", model, "--method", "lim", "--text", source(files, "seen"), "-o", str(scores), *SAMPLES
    )
    assert json.loads(scores.read_text()) == found
    made = command(
        "plan", model, "--average-bits", "3.6", "--score", str(scores), "--granularity", "block", "--solver", "order",
        "--picture", str(files / "plan.png"), "--held-out", source(files, "unseen"), "-o", str(plan), *SAMPLES,
    )  # fmt: skip
    assert [candidate["name"] for candidate in made["candidates"]] == ["order", "exact", "uniform"]  # type: ignore[index,union-attr]
    assert made["held_out"]["tokens"] == 4 * 31  # type: ignore[index,call-overload]
    assert {path.name for path in files.glob("plan*")} == {
        "plan.png", "plan.csv", "plan-curve.png", "plan-curve.csv", "plan.toml"
    }  # fmt: skip
    done = command("quantize", model, str(plan), "-o", str(files / "small"))
    assert float(str(done["bits_per_weight"])) <= 3.6


def test_losses_of_any_score_divide_the_budget_of_a_run(files: Path) -> None:
    """`fracbit quantize` takes what `fracbit score --levels` writes; levels differ in bits, type, block and axis at once."""
    model, losses = str(files / "model"), files / "losses.json"
    levels = "int2z/32,nf4/16 out,kmeans3/row,float"
    found = command(
        "score", model, "--method", "oracle", "--text", source(files, "seen"), "--granularity", "block", "--levels", levels,
        "-o", str(losses), *SAMPLES,
    )  # fmt: skip
    assert json.loads(losses.read_text()) == found
    assert len(found["schemes"]) == 4  # type: ignore[arg-type]
    done = command(
        "quantize", model, "-o", str(files / "divided"), "--average-bits", "4.2", "--levels", levels, "--score",
        str(losses), "--granularity", "block",
    )  # fmt: skip
    assert any("divided by exact" in note for note in done["notes"])  # type: ignore[attr-defined]
    looked = command("inspect", str(files / "divided"))
    assert 0 < float(str(looked["bits_per_weight"])) <= 4.2
    for block in range(3):
        mine = {
            str(layer["scheme"]) for name, layer in looked["layers"].items() if f"layers.{block}." in name
        }  # type: ignore[attr-defined]
        assert len(mine) <= 1


def test_an_allocation_is_carried_out_and_refused_for_another_model(
    files: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    """What `fracbit plan -o` writes as JSON, edited or not, is what `fracbit quantize` stores; `--keep` holds beside it."""
    model, path = str(files / "model"), files / "allocation.json"
    made = command("plan", model, "--average-bits", "3.6", "--keep", "*.layers.1.*", "-o", str(path))
    written = json.loads(path.read_text())
    assert written == made["allocation"]
    command("quantize", model, str(path), "-o", str(files / "carried"), "--keep", "*.layers.2.mlp.up_proj")
    looked: dict[str, dict[str, str]] = command("inspect", str(files / "carried"))["layers"]  # type: ignore[assignment]
    for name, number in written["layers"].items():
        scheme = written["schemes"][number]
        expected = None if scheme is None or "layers.2.mlp.up" in name else scheme["label"]
        assert looked[name]["scheme"] == (expected or "bf16"), name
    refused = (
        (["quantize", model, str(path), "-o", "x", "--bits", "8"], "nowhere to go"),
        (
            ["plan", model, "--average-bits", "3.6", "--embeddings", "int8:64", "-o", str(path)],
            "linears alone",
        ),
    )
    for words, said in refused:
        with pytest.raises(FracbitError, match=said):
            CliRunner().invoke(app, words, catch_exceptions=False)
    tiny_llama(seed=1).bfloat16().save_pretrained(files / "other")
    with pytest.raises(FracbitError, match="other weights"):
        CliRunner().invoke(
            app, ["quantize", str(files / "other"), str(path), "-o", "x"], catch_exceptions=False
        )


def test_a_run_keeps_a_size_and_fused_layers_together(files: Path) -> None:
    done = command(
        "quantize", str(files / "model"), "-o", str(files / "sized"), "--size", "65kB", "--fused", "--levels",
        "int2z/32,int3z/32,int4z/32", "--score", "weight-error",
    )  # fmt: skip
    assert int(str(done["bytes"])) <= 65_000
    layers: dict[str, dict[str, str]] = command("inspect", str(files / "sized"))["layers"]  # type: ignore[assignment]
    assert len({layer["scheme"] for layer in layers.values()}) > 1
    for block in range(3):
        for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({layers[f"model.layers.{block}.{name}_proj"]["scheme"] for name in group}) == 1


def test_a_run_is_judged_on_held_out_text_before_it_is_written(files: Path) -> None:
    """Either the division is written, or the uniform scheme that beat it; the notes say which, and give the losses."""
    (files / "long.u16").write_bytes(np.random.default_rng(1).integers(0, 96, 8320).astype("<u2").tobytes())
    done = command(
        "quantize", str(files / "model"), "-o", str(files / "judged"), "--average-bits", "3.6", "--held-out",
        f"{files / 'long'}.u16?length=64",
    )  # fmt: skip
    (said,) = [note for note in done["notes"] if "held-out tokens" in note]  # type: ignore[attr-defined]
    looked = command("inspect", str(files / "judged"))
    used = {str(layer["scheme"]) for layer in looked["layers"].values()}  # type: ignore[attr-defined]
    assert ("the uniform scheme won" in said) == (len(used) == 1)
    assert float(str(looked["bits_per_weight"])) <= 3.6


def test_pruning_compares_and_writes(files: Path) -> None:
    pytest.importorskip("matplotlib")
    done = command(
        "prune", str(files / "model"), "-o", str(files / "pruned"), "--score", "first", "--held-out", source(files, "unseen"),
        "--picture", str(files / "prune.png"), *SAMPLES,
    )  # fmt: skip
    assert (files / "prune.png").exists()
    assert (files / "prune.csv").exists()
    assert done["dropped"] == ["model.layers.2"]
    assert done["blocks"] == 2
    assert {name: len(line) for name, line in done["comparison"].items()} == {"quantized": 4, "pruned": 3}  # type: ignore[attr-defined]
    for pruned, quantized in done["equal_size"]:  # type: ignore[attr-defined]
        assert quantized is None or quantized[0] <= pruned[0] + 1e-6
    assert done["equal_size"][0][0] == done["equal_size"][0][1]  # type: ignore[index]


def test_pruning_takes_edited_scores_of_its_own_model(files: Path) -> None:
    model, path = str(files / "model"), files / "edited.json"
    scores = command("score", model, "--method", "first", "-o", str(path))
    path.write_text(json.dumps(scores | {"values": scores["values"] | {"model.layers.0": -9.0}}))  # type: ignore[operator]
    done = command("prune", model, "-o", str(files / "edited"), "--score", str(path))
    assert done["dropped"] == ["model.layers.0"]
    path.write_text(json.dumps(scores | {"model": "0" * 16}))
    with pytest.raises(FracbitError, match="other weights"):
        CliRunner().invoke(app, ["prune", model, "-o", "x", "--score", str(path)], catch_exceptions=False)


def test_the_lens_reports_and_draws(files: Path) -> None:
    pytest.importorskip("matplotlib")
    done = command(
        "lens", str(files / "model"), "--text", source(files, "unseen"), "--kinds", "gaussian,int3/32",
        "--intensities", "0.1,0.2", "-o", str(files / "lens"), "--scores", str(files / "lens.json"), *SAMPLES,
    )  # fmt: skip
    kinds = ["gaussian", "gaussian", "int3/32", "int3/32 as gaussian"]
    assert [point["kind"] for point in done["curves"]] == 2 * kinds  # type: ignore[attr-defined,index]
    assert len(done["fragility"]) == 3  # type: ignore[arg-type]
    names = {
        "intensity.png",
        "intensity.csv",
        "effects.png",
        "effects.csv",
        "fragility.csv",
        "profile.png",
        "profile.csv",
    }
    assert {path.name for path in (files / "lens").iterdir()} == names
    made = command(
        "plan",
        str(files / "model"),
        "--average-bits",
        "3.6",
        "--score",
        str(files / "lens.json"),
        "--granularity",
        "block",
    )
    assert made["allocation"]["origin"]["score"] == "lens:gaussian x weight-error"  # type: ignore[index,call-overload]


def test_planted_outliers_break_int8_activations(files: Path) -> None:
    words = ("lens", str(files / "model"), "--text", source(files, "unseen"), "--kinds", "int8/tensor",
             "--target", "activations", "--granularity", "module", *SAMPLES)  # fmt: skip
    plain, planted = command(*words), command(*words, "--plant", "50")
    assert planted["planted_norms"] == 6
    assert planted["float_nll"] == pytest.approx(plain["float_nll"], abs=1e-4)
    before, after = (done["curves"][0]["intensity"] for done in (plain, planted))  # type: ignore[index]
    assert after > 1.3 * before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "MODEL"], "exactly one of"),
        (["plan", "MODEL", "--average-bits", "1"], "below the lowest"),
        (["plan", "MODEL", "--average-bits", "3", "--levels", "int4z/64"], "leaves nothing to choose"),
        (["plan", "MODEL", "--average-bits", "3", "--score", "limm"], "did you mean 'lim'"),
        (["plan", "MODEL", "--average-bits", "3", "--picture", "plan.jpeg2"], "no kind of picture"),
        (["plan", "MODEL", "--average-bits", "3", "--text", "a.u16", "--held-out", "a.u16"], "flatters"),
        (["plan", "MODEL", "--average-bits", "3", "-o", "gone/plan.toml"], "gone is no folder"),
        (["score", "MODEL", "--method", "lim"], "reads text"),
        (["score", "MODEL", "-o", "gone/scores.json"], "gone is no folder"),
        (["lens", "MODEL", "--text", "TEXT", "--scores", "gone/lens.json"], "gone is no folder"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--score", "lim"], "measure it first"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "9"], "above the highest"),
        (["quantize", "MODEL", "-o", "x", "--score", "zd"], "go with a budget"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--score", "gone.json"], "cannot be read"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--bits", "8"], "leave out --dtype"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--keep", "*"], "name every linear"),
        (
            ["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--preset", "best", "--fused"],
            "for itself",
        ),
        (["quantize", "MODEL", "-o", "x", "--solver", "order"], "go with a budget"),
        (["score", "MODEL", "--granularity", "row"], "use block or linear"),
        (["prune", "MODEL"], "nothing to do"),
        (["prune", "MODEL", "-o", "x", "--score", "first", "--picture", "p.png"], "of the comparison"),
        (
            ["prune", "MODEL", "--score", "first", "--held-out", "TEXT", "--low", "float", *SAMPLES],
            "no fewer bits",
        ),
        (["lens", "MODEL", "--text", "TEXT", "--seeds", "2"], "at least 5"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "0,x", *SAMPLES], "takes numbers"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "0", *SAMPLES], "is none"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "nan", *SAMPLES], "is none"),
        (["lens", "MODEL", "--text", "TEXT", "--kinds", "gausian", *SAMPLES], "did you mean"),
        (["lens", "MODEL", "--text", "TEXT", "--plant", "0", *SAMPLES], "is none"),
    ],
)
def test_bad_input_is_one_of_our_errors(files: Path, words: list[str], says: str) -> None:
    replaced = [
        {"MODEL": str(files / "model"), "TEXT": source(files, "seen")}.get(word, word) for word in words
    ]
    with pytest.raises(FracbitError, match=says):
        CliRunner().invoke(app, replaced, catch_exceptions=False)
