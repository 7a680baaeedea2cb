"""`fracbit eval`: perplexity of any checkpoint, and how far it is from the float model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fracbit.cli.show import print_json, print_notes, progress
from fracbit.errors import DataError


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id, fracbit or float.")],
    text: Annotated[
        str,
        typer.Option(
            help="Text, jsonl, parquet or id file, datasets:NAME, or bundled; options after ?, see docs/guide.md."
        ),
    ],
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
    """Measure perplexity on a text, with the protocol beside it."""
    from fracbit.checkpoint.load import load, load_tokenizer, tokenizer_or_none
    from fracbit.evaluate import divergence, perplexity
    from fracbit.pipeline.api import ids_of, read_text
    from fracbit.pipeline.overlap import calibration_sources, overlap_notes

    loaded = load(model, dtype, device, trust_remote_code)
    tokenizer = tokenizer_or_none(model) if _is_ids(text) else load_tokenizer(model, trust_remote_code)
    vocabulary = loaded.config.get_text_config().vocab_size
    if bos is not None and not 0 <= bos < vocabulary:
        raise DataError(f"--bos {bos} is no id of this model: its vocabulary is 0..{vocabulary - 1}")
    tokens = read_text(text, tokenizer, loaded)
    ids = ids_of(tokens)
    notes = (*tokens.notes, *overlap_notes(tokens, calibration_sources(model), tokenizer, vocabulary))
    with progress(json) as show:
        found = perplexity(
            loaded, ids, window=window, stride=stride, bos=bos, batch=batch,
            progress=lambda done, total: show("perplexity", done, total),
        )  # fmt: skip
        apart = None
        if against is not None:
            reference = load(against, dtype, device, trust_remote_code)
            apart = divergence(
                reference, loaded, ids, window=window, stride=stride, bos=bos, batch=batch,
                progress=lambda done, total: show("divergence", done, total),
            )  # fmt: skip
    result: dict[str, Any] = {
        "model": model,
        "text": str(text),
        "text_sha256": tokens.sha256,
        **found.to_json(),
    }
    if apart is not None:
        result["divergence"] = {"against": against, **apart.to_json()}
    result["notes"] = list(notes)
    if json:
        print_json(result)
        return
    print_notes(notes)
    print(
        f"perplexity {found.perplexity:.4f} ({found.nll:.5f} nats per token), {found.tokens_per_second:.0f} tokens/s"
    )
    print(f"protocol: {found.protocol}")
    if apart is not None:
        print(f"from {against}: {apart}")


def _is_ids(text: str) -> bool:
    from fracbit.data import parse_source

    return parse_source(text).format in ("u16", "u32", "npy")
