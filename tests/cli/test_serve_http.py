"""`fracbit serve` over a socket, as a process of its own: answers, streams, refusals, clients that go away, its end."""

from __future__ import annotations

import functools
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from fracbit.bundled import bundled_model
from fracbit.cli import app

pytest.importorskip("starlette", reason="fracbit[serve] is not installed")
pytest.importorskip("uvicorn", reason="fracbit[serve] is not installed")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY = "a key"
CHAT = {
    "model": "small",
    "messages": [{"role": "user", "content": "import"}],
    "max_tokens": 8,
    "temperature": 0,
}
TEXT = {"model": "small", "prompt": "def main(", "max_tokens": 8, "temperature": 0}


class Served:
    """A server that runs; the process, and where it listens."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fracbit", "serve", *words, "--port", "0", "--dtype", "float32"],
            stderr=subprocess.PIPE,
            text=True,
            # A runner in the background hands down an ignored SIGINT, which Python would keep ignoring.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stderr is not None
        said = ""
        while not (found := re.search(r"http://127.0.0.1:(\d+)/v1", said)):
            line = self.process.stderr.readline()
            assert line, said
            said += line
        self.said, self.port = said, int(found[1])

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        to = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        to.request(method or ("GET" if body is None else "POST"), path, data, sent)
        answer = to.getresponse()
        found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        to.close()
        return found

    def good(self, path: str, body: Any = None) -> dict[str, Any]:
        """The object of an answer with status 200."""
        status, _, text = self.ask(path, body)
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "small"
    shutil.copytree(bundled_model(), folder)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = Served(str(folder), "--api-key", KEY, "--batch", "2", "--queue", "1", "--max-length", "400")
    try:
        yield made
    finally:
        made.process.send_signal(signal.SIGINT)
        assert "stopped serving" in made.process.communicate(timeout=60)[1]
        assert made.process.returncode == 0


def events(text: bytes) -> list[Any]:
    """What a stream holds, `[DONE]` as None."""
    lines = [line.removeprefix("data: ") for line in text.decode().split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_chat_whole_and_streamed(server: Served) -> None:
    whole = server.good("/v1/chat/completions", CHAT)
    assert whole["object"] == "chat.completion"
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant"
    assert whole["usage"]["completion_tokens"] == 8
    status, headers, text = server.ask(
        "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *parts, counted, end = events(text)
    assert end is None
    assert counted["usage"] == whole["usage"]
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == choice["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_completions_of_texts_and_ids_and_several_choices(server: Served) -> None:
    one = server.good("/v1/completions", TEXT)["choices"][0]["text"]
    two = server.good("/v1/completions", {**TEXT, "prompt": ["def main(", "import"], "n": 1})["choices"]
    assert [choice["index"] for choice in two] == [0, 1]
    assert two[0]["text"] == one
    seeded = {**TEXT, "temperature": 1, "seed": 4, "n": 2, "max_tokens": 12}
    first, again = (server.good("/v1/completions", seeded)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert first[0]["text"] != first[1]["text"]
    cut = server.good("/v1/completions", {**TEXT, "stop": one[2:4]})["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (one.partition(one[2:4])[0], "stop")
    assert server.good("/v1/completions", {**TEXT, "prompt": [5, 6, 7]})["usage"]["prompt_tokens"] == 3


def test_models_and_health(server: Served) -> None:
    assert [each["id"] for each in server.good("/v1/models")["data"]] == ["small"]
    assert server.good("/v1/models/small")["id"] == "small"
    health = server.good("/health")
    assert health["status"] == "ok"
    assert health["step"]


REFUSED: dict[str, tuple[int, str, Any]] = {
    "another model": (404, "this server has 'small'", {**TEXT, "model": "other"}),
    "no model": (400, "model is missing", {"prompt": "x"}),
    "no prompt": (400, "prompt is missing", {"model": "small"}),
    "an empty prompt": (400, "at least one token", {**TEXT, "prompt": []}),
    "no JSON": (400, "no JSON", b"{"),
    "a list": (400, "JSON object", []),
    "deep": (400, "no JSON", b"[" * 200_000),
    "an id that is none": (400, "ids of 0..", {**TEXT, "prompt": [10**9]}),
    "too long": (400, "more than the 400", {**TEXT, "max_tokens": 400}),
    "too hot": (400, "temperature", {**TEXT, "temperature": 1e9}),
    "infinite": (400, "temperature", b'{"model": "small", "prompt": "x", "temperature": Infinity}'),
    "not served": (400, "logprobs is not served", {**TEXT, "logprobs": 2}),
    "tools": (400, "tools is not served", {**TEXT, "tools": [{}]}),
    "an empty stop": (400, "at least one character", {**TEXT, "stop": ""}),
    "more than fits the queue": (429, "try again later", {**TEXT, "n": 9}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_answered_is_refused(server: Served, case: str) -> None:
    expected, words, body = REFUSED[case]
    status, headers, text = server.ask("/v1/completions", body)
    assert status == expected, text
    assert words in json.loads(text)["error"]["message"]
    assert ("retry-after" in headers) == (expected == 429)
    assert server.good("/health")["status"] == "ok"


def test_images_and_bad_roles_are_refused(server: Served) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    status, _, text = server.ask("/v1/chat/completions", {**CHAT, "messages": [image]})
    assert (status, "text alone" in text.decode()) == (400, True)
    parts = {"role": "user", "content": [{"type": "text", "text": "imp"}, {"type": "text", "text": "ort"}]}
    assert server.good("/v1/chat/completions", {**CHAT, "messages": [parts]})["choices"]


def test_who_may_ask(server: Served) -> None:
    assert server.ask("/v1/models", Authorization="Bearer other")[0] == 401
    assert server.ask("/v1/completions", TEXT, Authorization="")[0] == 401
    assert server.ask("/v1/completions", TEXT, Content_Type="text/plain")[0] == 415, (
        "pages of other sites send this unasked"
    )
    assert server.ask("/health", Host="attacker.example")[0] == 400, "a name that was pointed at this machine"
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/completions")[0] == 405
    assert server.ask("/v1/completions", b" " * (5 << 20))[0] == 413


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_its_place(server: Served, stream: bool) -> None:
    body = json.dumps({**TEXT, "max_tokens": 390, "stream": stream, "prompt": "x", "n": 2}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as to:
        to.sendall(head.encode() + body)
        if stream:
            assert to.recv(64)
        else:
            time.sleep(0.1)
    deadline = time.monotonic() + 30
    while (found := server.good("/health"))["running"] + found["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.good("/v1/completions", TEXT)["choices"]


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(server: Served) -> None:
    done = CliRunner().invoke(app, ["serve", "bundled", "--port", str(server.port)])
    assert "cannot be listened on" in str(done.exception)
    done = CliRunner().invoke(app, ["serve", "bundled", "--host", "256.0.0.1"])
    assert "cannot be used" in str(done.exception)
