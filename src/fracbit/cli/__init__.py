"""The command line: parsing and printing only. Every command is one small file; `main` turns our errors into exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fracbit.cli import (
    bench,
    chat,
    demo,
    env,
    evaluate,
    export,
    generate,
    inspect,
    lens,
    plan,
    prove,
    prune,
    quantize,
    refine,
    report,
    score,
    serve,
    sweep,
    task,
    tweak,
    verify,
)
from fracbit.cli.renamed import RenamedOptions
from fracbit.cli.stopped import INTERRUPTED, Stopped
from fracbit.errors import FracbitError
from fracbit.records.progress import rank
from fracbit.records.version import __version__

app = typer.Typer(
    name="fracbit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"fracbit {__version__}")
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress a language model to any average bit width, and measure what each bit gains."""


app.command("quantize", cls=RenamedOptions)(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("prove")(prove.prove)
app.command("tweak")(tweak.tweak)
app.command("refine")(refine.refine)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("score")(score.score)
app.command("plan", cls=RenamedOptions)(plan.plan)
app.command("prune")(prune.prune)
app.command("lens")(lens.lens)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("task")(task.task)
app.command("env")(env.env)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a run of a sweep failed or `verify` found a fault, 2 bad input, 130 interrupted.
    """
    try:
        app()
    except FracbitError as error:
        print(f"fracbit: error: {f'rank {rank()}: ' if rank() else ''}{error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"fracbit: stopped; {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's code after Ctrl-C in a command that keeps nothing
            print("fracbit: stopped; this command keeps nothing that is unfinished", file=sys.stderr)
        raise


__all__ = ["app", "main"]
