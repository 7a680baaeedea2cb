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


def settings(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


SAMPLES = ("--samples", "4", "--length", "32")


def test_scores_go_into_a_plan_and_the_plan_into_a_checkpoint(files: Path) -> None:
    pytest.importorskip("matplotlib")
    model, scores, plan = str(files / "model"), files / "scores.json", files / "plan.toml"
    found = command(
        "score", model, "--method", "lim", "--text", source(files, "seen"), "-o", str(scores), *SAMPLES
    )
    assert json.loads(scores.read_text()) == found
    made = command(
        "plan", model, "--average-bits", "3.6", "--score", str(scores),
        "--picture", str(files / "plan.png"), "--held-out", source(files, "unseen"), "-o", str(plan),
        *settings("spending.granularity=block", "spending.solver=order", "spending.samples=4", "spending.length=32"),
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
        "quantize", model, "-o", str(files / "divided"), "--average-bits", "4.2",
        *settings(f"spending.levels={levels}", f"spending.score={losses}", "spending.granularity=block"),
    )  # fmt: skip
    assert any("divided by the solver exact" in note for note in done["notes"])  # type: ignore[attr-defined]
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
        (["quantize", model, str(path), "-o", "x", "--scheme", "int8"], "--scheme cannot be used"),
        (
            ["plan", model, "--average-bits", "3.6", "--set", "embeddings=int8:64", "-o", str(path)],
            "only the linears",
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


def test_a_score_that_reads_text_divides_the_budget_of_a_run(files: Path) -> None:
    """One command: the score reads the calibration texts, and no more of them than the calibration."""
    text = source(files, "seen")
    words = (
        "quantize", str(files / "model"), "--average-bits", "3.5", "--calibration", text, "--quantizer", "gptq",
        *settings("spending.score=lim", "calibration.samples=4", "calibration.length=32"),
    )  # fmt: skip
    done = command(*words, "-o", str(files / "read"))
    assert float(str(done["bits_per_weight"])) <= 3.5
    command(
        "score", str(files / "model"), "--method", "lim", "--text", text, "--granularity", "linear", "-o",
        str(files / "lim.json"), *SAMPLES,
    )  # fmt: skip
    again = command(*words, "-o", str(files / "given"), "--set", f"spending.score={files / 'lim.json'}")
    assert again["bits_per_weight"] == done["bits_per_weight"]
    read, given = (command("inspect", str(files / name))["layers"] for name in ("read", "given"))
    assert read == given
    more = np.random.default_rng(2).integers(0, 96, (250, 32)).astype("<u2").tobytes()
    (files / "mixed.u16").write_bytes((files / "seen.u16").read_bytes() + more)
    judged = command(
        *words, "-o", str(files / "judged-on-it"), "--set", f"spending.held_out={source(files, 'mixed')}"
    )
    too_good = [note for note in judged["notes"] if "too good" in note]  # type: ignore[attr-defined]
    assert len(too_good) == 1
    assert "text that the score saw" in too_good[0]


def test_a_run_keeps_a_size_and_fused_layers_together(files: Path) -> None:
    done = command(
        "quantize", str(files / "model"), "-o", str(files / "sized"), "--size", "65kB",
        *settings("spending.fused=true", "spending.levels=int2z/32,int3z/32,int4z/32", "spending.score=weight-error"),
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
        "quantize", str(files / "model"), "-o", str(files / "judged"), "--average-bits", "3.6",
        "--set", f"spending.held_out={files / 'long'}.u16?length=64",
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
        "--set",
        "spending.granularity=block",
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
        (["plan", "MODEL", "--average-bits", "3", "--picture", "plan.jpeg2"], "is not a picture"),
        (["plan", "MODEL", "--average-bits", "3", "--text", "a.u16", "--held-out", "a.u16"], "would flatter"),
        (["plan", "MODEL", "--average-bits", "3", "-o", "gone/plan.toml"], "gone is not a folder"),
        (["score", "MODEL", "--method", "lim"], "reads text"),
        (["score", "MODEL", "-o", "gone/scores.json"], "gone is not a folder"),
        (["lens", "MODEL", "--text", "TEXT", "--scores", "gone/lens.json"], "gone is not a folder"),
        (
            ["quantize", "MODEL", "-o", "x", "--average-bits", "3", *settings("spending.score=lim")],
            "score lim reads text",
        ),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "9"], "above the highest"),
        (["quantize", "MODEL", "-o", "x", *settings("spending.score=zd")], "only with a budget"),
        (
            ["quantize", "MODEL", "-o", "x", "--average-bits", "3", *settings("spending.score=gone.json")],
            "cannot be read",
        ),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--scheme", "int8"], "leave out --scheme"),
        (["quantize", "MODEL", "-o", "x", "--average-bits", "3", "--keep", "*"], "name every linear"),
        (
            [
                "quantize",
                "MODEL",
                "-o",
                "x",
                "--average-bits",
                "3",
                "--preset",
                "best",
                *settings("spending.fused=true"),
            ],
            "for itself",
        ),
        (["quantize", "MODEL", "-o", "x", *settings("spending.solver=order")], "only with a budget"),
        (["score", "MODEL", "--granularity", "row"], "known: block, linear"),
        (["prune", "MODEL"], "nothing to do"),
        (["prune", "MODEL", "-o", "x", "--score", "first", "--picture", "p.png"], "shows the comparison"),
        (
            ["prune", "MODEL", "--score", "first", "--held-out", "TEXT", "--low", "float", *SAMPLES],
            "no fewer bits",
        ),
        (["lens", "MODEL", "--text", "TEXT", "--seeds", "2"], "at least 5"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "0,x", *SAMPLES], "takes numbers"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "0", *SAMPLES], "finite number above 0"),
        (["lens", "MODEL", "--text", "TEXT", "--intensities", "nan", *SAMPLES], "finite number above 0"),
        (["lens", "MODEL", "--text", "TEXT", "--kinds", "gausian", *SAMPLES], "did you mean"),
        (["lens", "MODEL", "--text", "TEXT", "--plant", "0", *SAMPLES], "finite number above 0"),
    ],
)
def test_bad_input_is_one_of_our_errors(files: Path, words: list[str], says: str) -> None:
    replaced = [
        {"MODEL": str(files / "model"), "TEXT": source(files, "seen")}.get(word, word) for word in words
    ]
    with pytest.raises(FracbitError, match=says):
        CliRunner().invoke(app, replaced, catch_exceptions=False)
