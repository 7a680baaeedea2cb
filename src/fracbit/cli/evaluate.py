"""`fracbit eval`: perplexity of any checkpoint, how far it is from the float model, and zero-shot accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fracbit.cli.show import print_json, print_notes, progress
from fracbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id, fracbit or float.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text, jsonl, parquet or id file, datasets:NAME, or bundled; options after ?, see docs/guide.md."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot tasks of lm-eval, comma separated: names, `paper` for the scaling paper's four, task files (.yaml)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens seen at once; default the model's, at most 2048.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens the window moves by; default the window.")
    ] = None,
    bos: Annotated[int | None, typer.Option(help="Token id put before every window.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Float model: also KL divergence and top-1 agreement.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows run together.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Type of what is not quantized: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity on a text, with the protocol beside it, and accuracy on tasks."""
    if text is None and (tasks is None or against is not None):
        raise DataError("nothing to measure: give --text for perplexity, --tasks for accuracy, or both")
    from fracbit.checkpoint.load import load, load_tokenizer, tokenizer_or_none
    from fracbit.evaluation import ask, prepare, tasks_of

    questions = None if tasks is None else prepare(tasks_of(tasks.split(",")))
    loaded = load(model, dtype, device, trust_remote_code)
    ids_alone = tasks is None and text is not None and _is_ids(text)
    tokenizer = tokenizer_or_none(model) if ids_alone else load_tokenizer(model, trust_remote_code)
    result: dict[str, Any] = {"model": model, "notes": []}
    lines: list[str] = []
    if text is not None:
        reference = None if against is None else (against, load(against, dtype, device, trust_remote_code))
        protocol = {"window": window, "stride": stride, "bos": bos, "batch": batch}
        figures, lines = _judge(model, loaded, tokenizer, text, reference, protocol, json)
        result |= figures
    if questions is not None and tokenizer is not None:
        asked = ask(loaded, tokenizer, questions, limit=limit, batch=batch, quiet=json)
        result["zero_shot"] = asked.to_json()
        lines += [f"{score}: {_accuracies(score.metrics)}" for score in asked.scores]
        lines += [] if asked.paper_mean is None else [f"mean of the four: {asked.paper_mean:.4f}"]
    if json:
        print_json(result)
        return
    print_notes(result["notes"])
    print("\n".join(lines))


def _judge(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    reference: tuple[str, PreTrainedModel] | None,
    protocol: dict[str, int | None],
    quiet: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Perplexity of the model called `name`, and divergence from `reference` (its name, itself): figures and lines."""
    from fracbit.evaluation import divergence, perplexity
    from fracbit.pipeline.study.overlap import calibration_sources, overlap_notes
    from fracbit.pipeline.verbs import ids_of, read_text

    vocabulary, bos = model.config.get_text_config().vocab_size, protocol["bos"]
    if bos is not None and not 0 <= bos < vocabulary:
        raise DataError(f"--bos {bos} is no id of this model: its vocabulary is 0..{vocabulary - 1}")
    tokens = read_text(text, tokenizer, model)
    notes = [*tokens.notes, *overlap_notes(tokens, calibration_sources(name), tokenizer, vocabulary)]
    options: Any = protocol
    with progress(quiet) as show:
        ids = ids_of(tokens)
        found = perplexity(model, ids, **options, progress=partial(show, "perplexity"))
        figures = {"text": text, "text_sha256": tokens.sha256, **found.to_json(), "notes": notes}
        lines = [
            f"perplexity {found.perplexity:.4f} ({found.nll:.5f} nats per token), {found.tokens_per_second:.0f} tokens/s",
            f"protocol: {found.protocol}",
        ]
        if reference is not None:
            float_name, float_model = reference
            apart = divergence(float_model, model, ids, **options, progress=partial(show, "divergence"))
            figures["divergence"] = {"against": float_name, **apart.to_json()}
            lines.append(f"from {float_name}: {apart}")
    return figures, lines


def _accuracies(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" + (f" ± {metrics[name + '_stderr']:.4f}" if f"{name}_stderr" in metrics else "")
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    )


def _is_ids(text: str) -> bool:
    from fracbit.data import parse_source

    return parse_source(text).format in ("u16", "u32", "npy")
