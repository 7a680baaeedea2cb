"""An HTTP interface that clients of OpenAI's know: chat, completions, streaming, models, health. By Starlette (fracbit[serve]).

What changes the text and is not served here is refused, not ignored. Only JSON is read, so that no web page can ask without the
browser asking first, and a server on localhost answers to no other name.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from fracbit.errors import DataError, FracbitError
from fracbit.pipeline.serve.scheduler import BusyError, Job, Scheduler, StoppedError, Told
from fracbit.records.checked import Checked
from fracbit.records.generating import Sampling

LARGEST = 4 << 20  # bytes of a request
READING = 30.0  # seconds that a request may take to arrive
GLANCE = 0.5  # seconds between looks whether the client is still there
LEGACY_NEW = 16  # tokens of a completion that names no number, as OpenAI's
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class StreamOptions(Checked):
    """`include_usage`: a last chunk counts tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    called: ClassVar[str] = "stream_options"
    include_usage: bool = False


class ClientRequest(Checked):
    """What both kinds of requests share. Unknown keys are hints and ignored, those of `UNSERVED` refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    called: ClassVar[str] = "the request"

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling(self, room: int, number: int) -> Sampling:
        """How choice `number` is sampled, with `room` tokens where the request names none. Raises `DataError`."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        seed = None if self.seed is None else self.seed + number
        new = self.max_tokens if self.max_tokens is not None else max(room, 1)
        return Sampling(new, self.temperature, self.top_p, seed=seed, stop=stop)


class TextRequest(ClientRequest):
    """`prompt`: a text, several, ids, or several lists of ids."""

    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...]


class ChatTurn(Checked):
    """A message of a chat: text, or parts of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    called: ClassVar[str] = "a message"
    role: str
    content: str | tuple[Mapping[str, Any], ...]

    @property
    def text(self) -> str:
        """The text. Raises `DataError` for an image or sound."""
        if isinstance(self.content, str):
            return self.content
        kinds = [part.get("type") for part in self.content if part.get("type") != "text"]
        if kinds:
            raise DataError(f"a part of a message is {kinds[0]!r}; this server reads text alone")
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(ClientRequest):
    """`messages`: the conversation so far."""

    messages: tuple[ChatTurn, ...] = Field(min_length=1)
    max_completion_tokens: int | None = None


UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None, False, 0), "top_logprobs": (None, 0), "echo": (None, False), "suffix": (None, ""),
    "best_of": (None, 1), "logit_bias": (None, {}), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
    "tools": (None, []), "functions": (None, []), "response_format": (None, {"type": "text"}), "audio": (None,),
}  # fmt: skip
"""Keys of OpenAI's interface that change the answer and are not served, with the values that ask for nothing."""


@dataclass(frozen=True)
class Server:
    """What the routes answer from. `name`: of the model; `key`: what clients must know, if anything."""

    name: str
    scheduler: Scheduler
    tokenizer: PreTrainedTokenizerBase
    key: str | None = None
    local: bool = True


@dataclass(frozen=True)
class Kind:
    """How chat and completions differ: names, and how a text is wrapped; the argument says whether it is a part of a stream."""

    prefix: str
    object: str
    part: str
    wrap: Callable[[str, bool], dict[str, Any]]


CHAT = Kind(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text, part: (
        {"delta": {"content": text}} if part else {"message": {"role": "assistant", "content": text}}
    ),
)
TEXT = Kind("cmpl", "text_completion", "text_completion", lambda text, part: {"text": text})


class RefusedError(FracbitError):
    """A request that is answered with an error of HTTP `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def application(server: Server) -> Starlette:
    """The routes of a server."""

    async def health(request: Request) -> Response:
        work, alive = server.scheduler, server.scheduler.alive
        facts = {"running": len(work.rows), "waiting": len(work.waiting), "step": work.together.name}
        return JSONResponse(
            {"status": "ok" if alive else "stopped", **facts}, status_code=200 if alive else 503
        )

    async def models(request: Request) -> Response:
        _check_key(server, request)
        entry = {"id": server.name, "object": "model", "created": begun, "owned_by": "fracbit"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [entry]})
        _check_model(server, name)
        return JSONResponse(entry)

    async def chat(request: Request) -> Response:
        asked = await _read(server, request, ChatRequest)
        text = _conversation(server, asked)
        ids = list(server.tokenizer(text, add_special_tokens=False)["input_ids"])
        if asked.max_tokens is None:
            asked = asked.model_copy(update={"max_tokens": asked.max_completion_tokens})
        return await _answer(server, request, CHAT, asked, [ids], server.scheduler.length)

    async def completions(request: Request) -> Response:
        asked = await _read(server, request, TextRequest)
        return await _answer(server, request, TEXT, asked, _prompts(server, asked), LEGACY_NEW)

    begun = int(time.time())
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL])] if server.local else []
    handlers: dict[Any, Any] = {FracbitError: _refusal, 404: _unknown, 405: _unknown}
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


async def _refusal(request: Request, error: FracbitError) -> Response:
    return JSONResponse(_error(error), status_code=_status(error), headers=_headers(error))


async def _unknown(request: Request, error: Exception) -> Response:
    said = f"{request.method} {request.url.path} is not served; see /v1/models, /v1/chat/completions, /v1/completions, /health"
    return JSONResponse(_error(RefusedError(404, said)), status_code=getattr(error, "status_code", 404))


def _status(error: FracbitError) -> int:
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, BusyError):
        return 429
    return 503 if isinstance(error, StoppedError) else 400


def _headers(error: FracbitError) -> dict[str, str]:
    return {"Retry-After": "1"} if isinstance(error, BusyError | StoppedError) else {}


def _error(error: FracbitError) -> dict[str, Any]:
    kind = "invalid_request_error" if _status(error) < 429 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": _status(error)}}


def _check_key(server: Server, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if server.key is not None and not hmac.compare_digest(given.encode(), server.key.encode()):
        raise RefusedError(401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`")


def _check_model(server: Server, name: str) -> None:
    if name != server.name:
        raise RefusedError(404, f"no model {name!r} here; this server has {server.name!r}")


async def _read(server: Server, request: Request, kind: type[Any]) -> Any:
    """The request as a record. Raises `RefusedError`, `RecipeError`, `DataError`."""
    _check_key(server, request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "the request is to be JSON, with `Content-Type: application/json`")
    try:
        body = await asyncio.wait_for(_body(request), READING)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the request did not arrive within {READING:g} s") from None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError("the request is to be a JSON object")
    for key, nothing in UNSERVED.items():
        if found.get(key) not in nothing:
            raise DataError(f"{key} is not served here; leave it out")
    defaults = [key for key, value in found.items() if value is None]  # null stands for the default
    asked = kind(**{key: value for key, value in found.items() if key not in defaults})
    _check_model(server, asked.model)
    return asked


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise RefusedError(413, f"the request has more than {LARGEST} bytes")
        parts.append(part)
    return b"".join(parts)


def _conversation(server: Server, asked: ChatRequest) -> str:
    """The messages as the model was trained to read them. Raises `DataError`."""
    if not server.tokenizer.chat_template:
        raise DataError(
            "this model's tokenizer has no chat template, so it was not trained to chat; use /v1/completions"
        )
    from jinja2 import TemplateError

    messages = [{"role": each.role, "content": each.text} for each in asked.messages]
    try:
        made = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"the model's chat template does not take these messages: {error}") from error
    return str(made)


def _prompts(server: Server, asked: TextRequest) -> list[Sequence[int]]:
    """The ids of every prompt."""
    prompt = asked.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        prompt = (prompt,)  # type: ignore[assignment]
    return [
        list(server.tokenizer(each)["input_ids"]) if isinstance(each, str) else each  # type: ignore[misc]
        for each in prompt
    ]


async def _answer(
    server: Server,
    request: Request,
    kind: Kind,
    asked: ClientRequest,
    prompts: Sequence[Sequence[int]],
    room: int,
) -> Response:
    """Submit a job for every choice; the whole answer, or a stream of it. `room`: tokens of prompt and answer, or new ones."""
    pieces: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def teller(number: int) -> Callable[[Told], None]:
        def tell(piece: Told) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        return tell

    jobs: list[Job] = []
    for ids in prompts:
        for choice in range(asked.n):
            left = room - len(ids) if kind is CHAT else room
            jobs.append(Job(ids, asked.sampling(left, choice), teller(len(jobs))))
    server.scheduler.submit(*jobs)
    heard = _heard(request, jobs, pieces)
    frame = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            _stream(frame, kind, jobs, heard, usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    return await _whole(frame, kind, jobs, heard)


async def _heard(
    request: Request, jobs: Sequence[Job], pieces: asyncio.Queue[tuple[int, Told]]
) -> AsyncGenerator[tuple[int, Told], None]:
    """Pieces until every job has ended. When the client goes away, or nobody listens any more, the jobs are cancelled."""
    left = len(jobs)
    try:
        while left:
            try:
                number, piece = await asyncio.wait_for(pieces.get(), GLANCE)
            except asyncio.TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None
                continue
            left -= piece.last
            yield number, piece
    finally:
        for job in jobs:
            job.cancelled.set()


async def _whole(
    frame: Mapping[str, Any], kind: Kind, jobs: Sequence[Job], heard: AsyncGenerator[tuple[int, Told], None]
) -> Response:
    texts, reasons, made = [""] * len(jobs), [""] * len(jobs), 0
    try:
        async for number, piece in heard:
            if piece.error is not None:
                raise RefusedError(504 if piece.late else 500, piece.error)
            texts[number] += piece.text
            reasons[number] = piece.reason or ""
            made += piece.tokens
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    finally:
        await heard.aclose()
    choices = [
        {"index": number, "finish_reason": reason, "logprobs": None, **kind.wrap(text, False)}
        for number, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return JSONResponse({**frame, "object": kind.object, "choices": choices, "usage": _usage(jobs, made)})


async def _stream(
    frame: Mapping[str, Any],
    kind: Kind,
    jobs: Sequence[Job],
    heard: AsyncGenerator[tuple[int, Told], None],
    usage: bool,
) -> AsyncGenerator[str, None]:
    """The events of a stream; an error ends it, as one more event."""
    made = 0
    begun: set[int] = set()
    shared = {**frame, "object": kind.part}
    try:
        async for number, piece in heard:
            if piece.error is not None:
                yield _event(_error(RefusedError(504 if piece.late else 500, piece.error)))
                return
            made += piece.tokens
            if not piece.text and piece.reason is None:
                continue
            choice = {
                "index": number,
                "finish_reason": piece.reason,
                "logprobs": None,
                **kind.wrap(piece.text, True),
            }
            if "delta" in choice and number not in begun:
                choice["delta"]["role"] = "assistant"
            begun.add(number)
            yield _event({**shared, "choices": [choice]})
        if usage:
            yield _event({**shared, "choices": [], "usage": _usage(jobs, made)})
        yield "data: [DONE]\n\n"
    except ClientDisconnect:
        return
    finally:
        await heard.aclose()


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _usage(jobs: Sequence[Job], made: int) -> dict[str, int]:
    read = sum({id(job.ids): len(job.ids) for job in jobs}.values())
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
