"""The words of the command line: sixteen everyday options, `--set` for the rest, old names, headings, names without torch."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.models import OptionInfo
from typer.testing import CliRunner

import fracbit
from fracbit.cli import app
from fracbit.cli.asked import Asked, asked, known_settings
from fracbit.cli.plan import Planning
from fracbit.cli.quantize import Running
from fracbit.cli.renamed import OLD, rewritten
from fracbit.cli.settings import REQUIRED, listing, read_settings
from fracbit.errors import FracbitError, RecipeError, SchemeError
from fracbit.records.calibration import Calibration
from fracbit.records.outliers import Outliers
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MOST = 18
HEADINGS = {
    "quantize": ["What to write", "How small", "With data", "Where and how it runs"],
    "plan": ["What to write", "How small", "With data", "Where and how it runs"],
    "eval": ["What to measure", "With data", "Where and how it runs"],
    "sweep": ["What to write", "What to measure", "Where and how it runs", "On Ray"],
    "generate": ["What to write", "Where and how it runs"],
    "chat": ["What to write", "Where and how it runs"],
    "bench": ["What to measure", "Where and how it runs"],
    "score": ["What to write", "What to measure", "With data", "Where and how it runs"],
    "lens": ["What to write", "What to measure", "With data", "Where and how it runs"],
}


class Stopped(Exception):
    """Raised in place of the work, with what it would have been given."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> typing.Callable[..., Asked[Any]]:
    """What a command line asks for: everything but the work itself runs."""

    def quantize(recipe: Recipe, output: Path, **given: Any) -> None:
        run = Running(given["device"], given["shard_bytes"] >> 20)
        raise Stopped(Asked(recipe, given["spending"], run))

    def plan(recipe: Recipe, spending: Spending, **given: Any) -> None:
        raise Stopped(Asked(recipe, spending, Planning()))

    def parse(*words: object) -> Asked[Any]:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if not isinstance(done.exception, Stopped):
            assert done.exception is not None, done.output
            raise done.exception
        found: Asked[Any] = done.exception.args[0]
        return found

    monkeypatch.setitem(vars(fracbit), "quantize", quantize)
    monkeypatch.setitem(vars(fracbit), "plan", plan)
    for check in ("names.check_terms", "quantize.check_model", "plan.check_model"):  # of what is not there
        monkeypatch.setattr(f"fracbit.cli.{check}", lambda *given: None)
    return parse


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_at_most_eighteen_options(name: str) -> None:
    options = [each for each in COMMANDS[name].params if each.param_type_name == "option" and not each.hidden]
    assert len(options) <= MOST, [each.name for each in options]


def test_an_option_that_several_commands_take_is_written_once() -> None:
    seen: dict[tuple[object, ...], tuple[str, int]] = {}
    for name, command in COMMANDS.items():
        for hint in typing.get_type_hints(command.callback, include_extras=True).values():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, OptionInfo) and option.help:
                    where = seen.setdefault((option.param_decls, option.help), (name, id(option)))
                    assert where[1] == id(option), f"{name} and {where[0]} each write: {option.help}"


@pytest.mark.parametrize("name", HEADINGS)
def test_help_stands_under_headings(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert re.findall(r"─ ([A-Z][A-Za-z ]+?) ─", shown) != []
    assert all(heading in shown for heading in HEADINGS[name])
    (bare,) = re.findall(r"─ Options ─+╮\n(.*?)╰", shown, re.DOTALL)
    assert set(re.findall(r"--[a-z-]+", bare)) == {"--help"}


# --- --set ---


def test_a_value_is_toml_where_it_is_of_the_type_and_text_elsewhere() -> None:
    known = known_settings(Running)
    words = {
        "seed=3": 3, "search=true": True, "scheme.block=32": 32, "scheme.block=row": "row", "scheme.axis=out": "out",
        "revision=2024": "2024", "revision=none": None, "revision='v1'": "v1", "calibration.tweak=none": "none",
        "calibration.rate=1e-3": 1e-3, "calibration.texts=a.txt, b.txt": ["a.txt", "b.txt"],
        'calibration.texts=["a,b.txt"]': ["a,b.txt"], "scheme.scale=int8:256": "int8:256", "head=none": None,
        "head=int8:64": Scheme("int", 8, 64).to_json(), "head=float": None, "head={bits = 8}": {"bits": 8},
        "spending.size=1.2GB": "1.2GB", "spending.average_bits=3": 3, "run.device=cuda:1": "cuda:1",
        'overrides=[{layers = "*.0.*", keep = true}]': [{"layers": "*.0.*", "keep": True}],
    }  # fmt: skip
    for word, value in words.items():
        assert read_settings([word], known) == {word.partition("=")[0]: value}, word


def test_a_list_grows_and_anything_else_is_replaced() -> None:
    words = ["calibration.texts=a", "seed=1", "calibration.texts=b,c", "seed=2"]
    assert read_settings(words, known_settings(Running)) == {"calibration.texts": ["a", "b", "c"], "seed": 2}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("axis=out", "'scheme.axis' or .*'calibration.axis'"),
        ("scheme.axs=out", "did you mean 'scheme.axis'"),
        ("sed=3", "did you mean 'seed'"),
        ("outliers=cots:0.01", "did you mean 'cost'"),
        ("calibration.outliers=0.01", "did you mean 'outliers'"),
        ("tweek=auto", "did you mean 'calibration.tweak'"),
        ("nonsense=3", "--set help lists all keys"),
        ("search", "write it as key=value"),
        ("seed=many", "--set seed=many: the value must be a whole number"),
        ("scheme.bits=9", "from 1 to 8, got 9"),
        ("scheme=nf", "is not a scheme"),
        ("spending.context=long", "--set spending.context=long: the value must be a whole number"),
        ("run.shard_mb=0", "run.shard_mb must be at least 1"),
    ],
)
def test_what_set_does_not_take(word: str, says: str, parsed: typing.Callable[..., Asked[Any]]) -> None:
    with pytest.raises(FracbitError, match=says):
        parsed("quantize", "model", "-o", "out", "--set", word)


# A value of keys whose default is none, where "3" is no value of theirs; and the keys that need no budget beside them.
UNSET = {"embeddings": "int8/64", "head": "int8/64", "towers": "int8/64", "outliers": "cost:0.01", "spending.preset": "best",
         "spending.engine": "vllm",
         "spending.levels": "nf4/64,nf2/64"}  # fmt: skip
BUDGETS = ("spending.average_bits", "spending.size", "spending.fits")


def test_every_listed_key_is_accepted_with_its_default_and_with_a_value() -> None:
    known = known_settings(Running)
    listed = [key for key, *_ in listing(known)]
    assert {"seed", "scheme.axis", "calibration.tweak", "spending.score", "run.device"} <= set(listed)
    for key in listed:
        default = known[key].default
        texts = (
            ["x"]
            if default == REQUIRED
            else ["none", UNSET.get(key, "3")]
            if default is None
            else [toml(default)]
        )
        for text in texts:
            needed = ["calibration.texts=x"] if key.startswith("calibration.") else []
            needed += (
                ["spending.average_bits=3"] if key.startswith("spending.") and key not in BUDGETS else []
            )
            made = asked(Running, [*needed, f"{key}={text}"], {"model": "m"})
            assert isinstance(made.recipe, Recipe), key


def toml(value: object) -> str:
    return "[]" if value == () else str(value).lower()


def test_every_key_says_what_it_means() -> None:
    for key, kind, default, line in listing(known_settings(Running)):
        assert kind and default and len(line) > 10, (key, line)
        assert "`" not in line


def test_the_list_is_printed() -> None:
    for command in (["quantize"], ["plan"], ["plan", "model"]):
        done = CliRunner().invoke(app, [*command, "--set", "help"])
        assert done.exit_code == 0
        assert "scheme.axis" in done.stdout
        assert "spending.held_out" in done.stdout
        assert ("run.shard_mb" in done.stdout) == (command == ["quantize"])


# --- what flags, recipe files and settings make together ---


def test_a_scheme_in_one_word_replaces_the_recipes_and_settings_lie_over_it(
    tmp_path: Path, parsed: typing.Callable[..., Asked[Any]]
) -> None:
    (tmp_path / "r.toml").write_text(
        "model = 'm'\n[scheme]\nbits = 3\naxis = 'out'\n[calibration]\ntexts = ['t']\n"
    )
    run = ("quantize", tmp_path / "r.toml", "-o", "out")
    assert parsed(*run).recipe.scheme == Scheme("int", 3, 64, "out")
    assert parsed(*run, "--scheme", "nf4/32").recipe.scheme == Scheme("nf", 4, 32)
    assert parsed(*run, "--set", "scheme.bits=2").recipe.scheme == Scheme("int", 2, 64, "out")
    changed = Scheme("int", 3, 128, offset="zero", scale="fp32")
    for words in (("--set", "scheme.scale=fp32", "--scheme", "int3z:128"),
                  ("--set", "scheme.scale=fp32", "--set", "scheme=int3z/128")):  # fmt: skip
        assert parsed(*run, *words).recipe.scheme == changed
    made = parsed(*run, "--set", "calibration.samples=4", "--keep", "a", "--keep", "b").recipe
    assert made.calibration == Calibration(texts=("t",), samples=4)
    assert made.overrides == (Override(layers="a", keep=True), Override(layers="b", keep=True))
    assert parsed(*run, "--calibration", "u").recipe.calibration.texts == ("u",)


def test_everyday_options_arrive(parsed: typing.Callable[..., Asked[Any]]) -> None:
    made = parsed(
        "quantize", "m", "-o", "out", "--scheme", "int4/64 out", "--quantizer", "gptq", "--calibration", "a", "--calibration",
        "b", "--average-bits", 3.5, "--preset", "best", "--trust-remote-code",
    )  # fmt: skip
    assert made.recipe == Recipe(
        model="m", scheme=Scheme(axis="out"), quantizer="gptq", calibration=Calibration(texts=("a", "b")),
        trust_remote_code=True,
    )  # fmt: skip
    assert made.spending == Spending(preset="best", average_bits=3.5)
    assert parsed("quantize", "m", "-o", "out", "--size", "1GB").spending == Spending(size="1GB")
    planned = parsed(
        "plan", "m", "--fits", "8GB", "--text", "t", "--score", "lim", "--levels", "nf4,nf2"
    ).spending
    assert planned == Spending(fits="8GB", text="t", score="lim", levels="nf4,nf2")


def test_a_recipe_may_write_a_scheme_in_one_word(
    tmp_path: Path, parsed: typing.Callable[..., Asked[Any]]
) -> None:
    (tmp_path / "r.toml").write_text(
        "model = 'm'\nscheme = 'nf3/32'\nhead = 'int8/64'\nembeddings = 'int6z/row'\n"
    )
    run = ("quantize", tmp_path / "r.toml", "-o", "out")
    made = parsed(*run, "--set", "scheme.axis=out", "--set", "head.bits=6").recipe
    assert made.scheme == Scheme("nf", 3, 32, "out")
    assert (made.head, made.embeddings) == (Scheme(bits=6), Scheme(bits=6, block="row", offset="zero"))
    with pytest.raises(SchemeError, match="quantizes nothing"):
        parsed(*run, "--set", "scheme=float")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tweak", "closed"], r"calibration\.texts is missing; give --calibration FILE"),
        (
            ["--set", "calibration.samples=0", "--calibration", "t"],
            r"calibration\.samples is 0; it should be greater",
        ),
    ],
)
def test_a_fault_of_a_setting_says_what_to_do(
    words: list[str], says: str, parsed: typing.Callable[..., Asked[Any]]
) -> None:
    with pytest.raises(RecipeError, match=says):
        parsed("quantize", "m", "-o", "out", *words)


def test_the_usage_has_single_brackets() -> None:
    for name in COMMANDS:
        usage = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
        assert "[[" not in usage.partition("─")[0], usage


@pytest.mark.parametrize(
    ("text", "error"), [("float", SchemeError), ("nf", SchemeError), ("nf4/", SchemeError)]
)
def test_what_is_no_scheme(
    text: str, error: type[FracbitError], parsed: typing.Callable[..., Asked[Any]]
) -> None:
    with pytest.raises(error):
        parsed("quantize", "m", "-o", "out", "--scheme", text)


# --- old names ---

TEXT = Calibration(texts=("t",))
# Old words of quantize, their new spelling, and what both make of a plain recipe calibrated on "t".
RENAMED: list[tuple[list[str], list[str], dict[str, Any]]] = [
    (["--dtype", "nf"], ["scheme.dtype=nf"], {"scheme": Scheme("nf")}),
    (["--bits", "3"], ["scheme.bits=3"], {"scheme": Scheme(bits=3)}),
    (["--bits=3"], ["scheme.bits=3"], {"scheme": Scheme(bits=3)}),
    (["--block", "row"], ["scheme.block=row"], {"scheme": Scheme(block="row")}),
    (["--block", "32"], ["scheme.block=32"], {"scheme": Scheme(block=32)}),
    (["--axis", "out"], ["scheme.axis=out"], {"scheme": Scheme(axis="out")}),
    (["--axis", "auto"], ["calibration.axis=gptq"], {"calibration": {"axis": "gptq"}}),
    (["--offset", "zero"], ["scheme.offset=zero"], {"scheme": Scheme(offset="zero")}),
    (["--scale", "int8:256"], ["scheme.scale=int8:256"], {"scheme": Scheme(scale="int8:256")}),
    (["--search"], ["search=true"], {"search": True}),
    (["--no-search"], ["search=false"], {"search": False}),
    (["--samples", "4"], ["calibration.samples=4"], {"calibration": {"samples": 4}}),
    (["--length", "16"], ["calibration.length=16"], {"calibration": {"length": 16}}),
    (["--chain", "float"], ["calibration.chain=float"], {"calibration": {"chain": "float"}}),
    (
        ["--transform", "rotate", "--transform", "smooth"],
        ["calibration.transforms=rotate,smooth"],
        {"calibration": {"transforms": ("rotate", "smooth")}},
    ),
    (["--outliers", "0.05"], ["outliers=cost:0.05"], {"outliers": Outliers(chosen="cost", share=0.05)}),
    (["--outliers", "0"], ["outliers=none"], {"outliers": None}),
    (["--tweak", "none"], ["calibration.tweak=none"], {"calibration": {"tweak": "none"}}),
    (["--tweak", "auto"], ["calibration.tweak=auto"], {"calibration": {"tweak": "auto"}}),
    (["--inputs", "int8"], ["calibration.inputs=int8"], {"calibration": {"inputs": "int8"}}),
    (["--distill", "2"], ["calibration.distill=2"], {"calibration": {"distill": 2}}),
    (["--context", "64"], ["spending.context=64"], {"context": 64}),
    (["--batch", "2"], ["spending.batch=2"], {"batch": 2}),
    (["--levels", "nf4/64,nf2/64"], ["spending.levels=nf4/64,nf2/64"], {"levels": "nf4/64,nf2/64"}),
    (["--score", "zd"], ["spending.score=zd"], {"score": "zd"}),
    (["--solver", "order"], ["spending.solver=order"], {"solver": "order"}),
    (["--granularity", "block"], ["spending.granularity=block"], {"granularity": "block"}),
    (["--fused"], ["spending.fused=true"], {"fused": True}),
    (["--held-out", "h.txt"], ["spending.held_out=h.txt"], {"held_out": "h.txt"}),
    (["--embeddings", "int8"], ["embeddings=int8"], {"embeddings": Scheme(bits=8)}),
    (["--head", "int8:32"], ["head=int8:32"], {"head": Scheme(bits=8, block=32)}),
    (["--seed", "7"], ["seed=7"], {"seed": 7}),
    (["--revision", "main"], ["revision=main"], {"revision": "main"}),
    (["--device", "cuda"], ["run.device=cuda"], {"device": "cuda"}),
    (["--shard-size", "9"], ["run.shard_mb=9"], {"shard_mb": 9}),
]


def made_of(changes: dict[str, Any]) -> Asked[Running]:
    recipe = {
        name: value
        for name, value in changes.items()
        if name in Recipe.model_fields and name != "calibration"
    }
    text = Calibration(texts=("t",), **changes.get("calibration", {}))
    spending = {name: value for name, value in changes.items() if name in Spending.__dataclass_fields__}
    spending |= {"average_bits": 3.5} if spending else {}
    run = {name: value for name, value in changes.items() if name in Running.__dataclass_fields__}
    return Asked(
        Recipe(model="m", quantizer="gptq", calibration=text, **recipe), Spending(**spending), Running(**run)
    )


@pytest.mark.parametrize(
    ("old", "new", "changes"), RENAMED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_an_old_name_makes_what_the_new_one_makes(
    old: list[str], new: list[str], changes: dict[str, Any], parsed: typing.Callable[..., Asked[Any]]
) -> None:
    run: tuple[str, ...] = ("quantize", "m", "-o", "out", "--quantizer", "gptq", "--calibration", "t")
    expected = made_of(changes)
    run += ("--average-bits", "3.5") if expected.spending.asked else ()
    assert parsed(*run, *old) == expected
    assert parsed(*run, *(word for setting in new for word in ("--set", setting))) == expected


def test_every_old_name_is_among_them() -> None:
    assert {word.partition("=")[0] for old, _, _ in RENAMED for word in old if word.startswith("--")} == set(
        OLD["quantize"]
    )
    spellings = {name for name, new in OLD["plan"].items() if OLD["quantize"].get(name) == new}
    assert set(OLD["plan"]) - spellings == {"--samples", "--length"}


def test_plan_has_old_names_too(parsed: typing.Callable[..., Asked[Any]]) -> None:
    run = ("plan", "m", "--size", "1GB")
    old = parsed(
        *run, "--samples", 4, "--length=16", "--solver", "order", "--head", "int8:64", "--seed", 2, "--fused"
    )
    changes = [
        "spending.samples=4",
        "spending.length=16",
        "spending.solver=order",
        "head=int8/64",
        "seed=2",
        "spending.fused=true",
    ]
    assert old == parsed(*run, *(word for change in changes for word in ("--set", change)))
    assert (old.spending.samples, old.spending.length) == (4, 16)
    assert (old.spending.solver, old.recipe.seed) == ("order", 2)


def test_an_old_name_is_noted_once_and_quietly_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["m", "-o", "out", "--axis", "out", "--", "--bits", "3"]
    assert rewritten(words, OLD["quantize"]) == [
        "m",
        "-o",
        "out",
        "--set",
        "scheme.axis=out",
        "--",
        "--bits",
        "3",
    ]
    said = capsys.readouterr().err
    assert said == "note: --axis out is now --set scheme.axis=out; version 0.3 removes the old name\n"
    assert rewritten([*words, "--quiet"], OLD["quantize"])
    rewritten(["--search", "--quiet"], OLD["quantize"])
    assert "--search" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"), [(["--bits"], "--bits needs a value"), (["--search=yes"], "takes no value")]
)
def test_an_old_name_without_its_value(words: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        rewritten(words, OLD["quantize"])


# --- names, without torch ---

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["fracbit", *sys.argv[1:]]
from fracbit.cli import main
main()
"""


def without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "close"),
    [
        (["quantize", "X", "-o", "o", "--quantizer", "gtpq"], "gptq"),
        (["quantize", "X", "-o", "o", "--scheme", "kmean4/64"], "kmeans"),
        (["quantize", "X", "-o", "o", "--set", "head=inf8"], "int"),
        (["quantize", "X", "-o", "o", "--preset", "bets"], "best"),
        (["quantize", "X", "-o", "o", "--average-bits", "3", "--set", "spending.score=limm"], "lim"),
        (["quantize", "X", "-o", "o", "--size", "1GB", "--set", "spending.levels=nff4/64,nf2/64"], "nf"),
        (
            ["quantize", "X", "-o", "o", "--calibration", "t", "--set", "calibration.transforms=rotato"],
            "rotate",
        ),
        (["quantize", "X", "-o", "o", "--calibration", "t", "--set", "calibration.tweak=clsd"], "closed"),
        (["quantize", "X", "-o", "o", "--set", "axs=out"], "axis"),
        (["plan", "X", "--average-bits", "3", "--score", "oracel"], "oracle"),
        (["score", "X", "--method", "reverse:zdd"], "zd"),
        (["prune", "X", "-o", "o", "--score", "frist"], "first"),
        (["lens", "X", "--text", "t", "--kinds", "gausian"], "gaussian"),
        (["export", "X", "--to", "flot", "-o", "o"], "float"),
        (["eval", "X", "--text", "t", "--dtype", "flaot16"], "float16"),
        (["generate", "X", "once", "--activations", "int9"], "int8"),
    ],
    ids=lambda words: words[-1],
)
def test_an_unknown_name_is_answered_before_torch_is_imported(words: list[str], close: str) -> None:
    done = without_torch(*words)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"did you mean .*'{re.escape(close)}|'[a-z.]*{close}'", done.stderr), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "X", "-o", "o", "--calibration", "gone.txt"],
        ["quantize", "X", "-o", "o", "--size", "1GB", "--set", "spending.text=gone.txt@0.5"],
        ["plan", "X", "--average-bits", "3", "--held-out", "gone.txt?keep=9"],
        ["score", "X", "--method", "lim", "--text", "gone.txt"],
        ["prune", "X", "--held-out", "gone.txt"],
        ["lens", "X", "--text", "gone.txt"],
        ["eval", "X", "--text", "gone.txt"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_text_is_answered_before_torch_is_imported(words: list[str]) -> None:
    done = without_torch(*words)
    assert done.returncode == 2, done.stderr
    assert "gone.txt: no such file" in done.stderr


def test_the_list_of_settings_needs_no_torch() -> None:
    done = without_torch("quantize", "--set", "help")
    assert done.returncode == 0, done.stderr
    assert "calibration.tweak" in done.stdout


def test_names_known_to_the_command_line_are_those_of_the_rooms() -> None:
    from fracbit.checkpoint.load import DTYPES
    from fracbit.cli.names import ACTIVATIONS, FLOAT_TYPES
    from fracbit.kernels import Activations

    assert set(DTYPES) == set(FLOAT_TYPES)
    assert set(ACTIVATIONS) == set(typing.get_args(Activations))
