"""`fracbit task`: task files for zero-shot evaluation where the hub cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models, check_texts
from fracbit.cli.show import print_json
from fracbit.errors import DataError
from fracbit.records.files import named_path

KINDS = ("continuation", "lambada")


def task(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="continuation: which of four texts continues another; lambada: the last word of a passage.",
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Held-out text as for `fracbit eval --text`; for lambada its JSON lines."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the task file and its data.", rich_help_panel=options.WRITE
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model with the tokenizer that reads the text.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    items: Annotated[int, typer.Option(help="Questions to cut.", rich_help_panel=options.WRITE)] = 500,
    context: Annotated[
        int, typer.Option(help="Words before the continuation.", rich_help_panel=options.WRITE)
    ] = 60,
    words: Annotated[
        int, typer.Option(help="Words of each continuation.", rich_help_panel=options.WRITE)
    ] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the questions.", rich_help_panel=options.WRITE)] = 0,
    json: options.Json = False,
) -> None:
    """Write a task for `fracbit eval --tasks FOLDER/NAME.yaml`, for a sweep's `tasks`, and for lm-eval itself."""
    if kind not in KINDS:
        raise DataError(f"no task is called {kind!r}: use {' or '.join(KINDS)}")
    if kind == "continuation" and model is None:
        raise DataError("no tokenizer for the text: name a model that has it with --model")
    check_texts(judged=[source])
    check_models(model)
    from fracbit.evaluation import write_continuation, write_lambada

    if kind == "lambada" or model is None:
        written = write_lambada(named_path(source, DataError), output)
    else:
        texts = _texts(source, model)
        written = write_continuation(
            texts, output, items=items, context_words=context, choice_words=words, seed=seed
        )
    if json:
        print_json({"task": written.name, "output": str(written.path)})
    else:
        print(f"{written.path}: task {written.name}")


def _texts(source: str, model: str) -> list[str]:
    """The documents of a source as text: read with the model's tokenizer, and decoded by it."""
    from fracbit.checkpoint.load import load_tokenizer
    from fracbit.data import read_documents

    tokenizer = load_tokenizer(model)
    documents = read_documents(source, tokenizer, len(tokenizer)).documents
    return [str(tokenizer.decode(document.tolist(), skip_special_tokens=True)) for document in documents]
