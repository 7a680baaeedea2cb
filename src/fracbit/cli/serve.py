"""`fracbit serve`: a model behind an HTTP interface that clients of OpenAI's know."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fracbit.bundled import BUNDLED
from fracbit.cli import options
from fracbit.cli.names import check_models, check_types
from fracbit.cli.show import print_notes, print_said
from fracbit.errors import DataError, OutputError
from fracbit.records.extras import check_extra
from fracbit.records.generating import Limits, check_kv_bits

if TYPE_CHECKING:
    from fracbit.pipeline.serve.openai import Server

WHO = "Who may ask"
MUCH = "How much"


def serve(
    model: options.AnyModel,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 for every network of this machine.", rich_help_panel=WHO
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=WHO)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FRACBIT_API_KEY",
            show_envvar=True,
            help="Key that clients must send.",
            rich_help_panel=WHO,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: its folder's name.", rich_help_panel=WHO),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Requests that are answered together.", rich_help_panel=MUCH)
    ] = 16,
    queue: Annotated[
        int,
        typer.Option(
            help="Requests that wait beside them; more are refused with status 429.", rich_help_panel=MUCH
        ),
    ] = 64,
    max_length: Annotated[
        int,
        typer.Option(
            help="Tokens of a prompt and its answer; default: the model's positions, at most 4096.",
            rich_help_panel=MUCH,
        ),
    ] = 0,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take, waiting included.", rich_help_panel=MUCH)
    ] = 300.0,
    kv_bits: options.KvBits = 16,
    activations: options.Activations = "float",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="The same answer to a request whatever is answered beside it; slower.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer OpenAI's clients with MODEL: /v1/chat/completions, /v1/completions, /v1/models, /health. Ctrl-C ends it."""
    check_types(dtype, activations)
    check_kv_bits(kv_bits)
    limits = Limits(batch, queue, max_length, timeout)
    if (api_key is not None and not api_key.isascii()) or api_key == "":
        raise DataError("the key must be of ASCII characters, at least one")
    check_models(model)
    for module in ("starlette", "uvicorn"):
        check_extra("fracbit serve", module, "serve")
    listening = _bound(host, port)
    with listening:
        from fracbit.checkpoint.load import load, load_tokenizer
        from fracbit.pipeline.serve.generation import choose_activations
        from fracbit.pipeline.serve.openai import Server
        from fracbit.pipeline.serve.scheduler import Scheduler

        tokenizer = load_tokenizer(model, trust_remote_code)
        loaded = load(model, dtype, device, trust_remote_code, deterministic=deterministic)
        choose_activations(loaded, activations)  # type: ignore[arg-type]
        scheduler = Scheduler(loaded, tokenizer, limits, kv_bits)
        try:
            called = name or (BUNDLED if model == BUNDLED else Path(model).resolve().name)
            server = Server(called, scheduler, tokenizer, key=api_key, local=_is_local(host))
            listening.listen()  # from here on clients are heard, even before uvicorn accepts them
            if not quiet:
                print_notes(_notes(server))
                place = f"http://{'[' + host + ']' if ':' in host else host}:{listening.getsockname()[1]}/v1"
                print_said(f"serving {called} at {place}: {scheduler.together.name}; Ctrl-C ends it")
            _run(server, listening, limits)
        finally:
            scheduler.close()


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before anything slow. Raises `OutputError` where it is taken or none of this machine's."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OutputError(f"--host {host} cannot be used: {error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except OSError as error:
        made.close()
        remedy = "name another with --port, or 0 for a free one"
        raise OutputError(f"{host}:{port} cannot be listened on ({error.strerror}); {remedy}") from error
    return made


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _notes(server: Server) -> list[str]:
    notes = []
    if not server.local and server.key is None:
        notes.append("anyone who reaches this machine may ask; --api-key asks for a key")
    if not server.tokenizer.chat_template:
        notes.append(
            "the tokenizer has no chat template: /v1/chat/completions is refused, /v1/completions works"
        )
    return notes


def _run(server: Server, listening: socket.socket, limits: Limits) -> None:
    import uvicorn

    from fracbit.pipeline.serve.openai import application

    config = uvicorn.Config(
        application(server),
        log_config=None,
        access_log=False,
        limit_concurrency=4 * (limits.batch + limits.queue),
        timeout_graceful_shutdown=5,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has ended what it answered
        print_said("fracbit: stopped serving")
