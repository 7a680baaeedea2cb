"""Models that are used for long and by many at once: threads that share a model, and prompts without end."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fracbit
from chaos.changes import HOSTILE
from chaos.mutations import Grounds
from chaos.trials import Broken, Change

THREADS = 8
PROMPTS = 40  # of one trial
REQUESTS = 96  # of one trial
GROWTH = 64 << 20  # bytes that a process may grow by between its first prompts and its last


def eight_threads(grounds: Grounds) -> Change:
    """Eight threads ask one model at once: each gets what it gets alone."""
    model = fracbit.load(grounds.packed)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        texts = [[chance.randrange(3, 250) for _ in range(chance.randrange(1, 40))] for _ in range(THREADS)]

        def answer(ids: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                return model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)

        def judge() -> str:
            alone, together = [answer(ids) for ids in texts], [torch.empty(0)] * THREADS

            def ask(number: int) -> None:
                together[number] = answer(texts[number])

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
                raise Broken("a thread got another answer than alone")
            return "unharmed: "

        return f"{THREADS} threads", judge

    return change


def many_prompts(grounds: Grounds) -> Change:
    """Prompts of every kind, one after another, through `generate`: none hangs, and memory does not grow."""
    from fracbit.checkpoint.load import load_tokenizer
    from fracbit.pipeline.serve.generation import Settings, generate

    model, tokenizer = fracbit.load(grounds.packed), load_tokenizer(grounds.packed)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        prompts = ["".join(chr(chance.choice((32, 65, 97, 233, 0x4E2D, 0x1F600, 10))) for _ in range(chance.randrange(1, 60)))
                   for _ in range(PROMPTS)]  # fmt: skip
        settings = Settings(max_new_tokens=8, temperature=chance.choice((0.0, 0.7)))

        def judge() -> str:
            before = 0
            for number, prompt in enumerate(prompts):
                generate(model, tokenizer, [prompt], settings)
                if number == PROMPTS // 4:
                    before = _resident()
            grown = _resident() - before
            if grown > GROWTH:
                raise Broken(f"the process grew by {grown} bytes")
            return f"unharmed: {PROMPTS} prompts"

        return f"{PROMPTS} prompts at temperature {settings.temperature}", judge

    return change


def hostile_clients(grounds: Grounds) -> Change:
    """`fracbit serve` with clients that ask for what cannot be, stop in the middle, or go away before their answer.

    Afterwards it gives the answer that it gave before, has not grown, and ends when it is told to.
    """

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        asked = [_request(chance) for _ in range(REQUESTS)]

        def judge() -> str:
            with _served(grounds.packed) as (process, port):
                before, size = _answer(port, PLAIN), 0
                for start in range(0, REQUESTS, THREADS):
                    threads = [
                        threading.Thread(target=_ask, args=(port, *each))
                        for each in asked[start : start + THREADS]
                    ]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    size = size or _resident(process.pid)
                if _answer(port, PLAIN) != before:
                    raise Broken("another answer than before")
                grown = _resident(process.pid) - size
                if grown > GROWTH:
                    raise Broken(f"the server grew by {grown} bytes")
            if process.returncode:
                raise Broken(f"the server ended with {process.returncode}")
            return f"unharmed: {REQUESTS} requests"

        return f"{REQUESTS} requests", judge

    return change


PLAIN = {"model": "m", "prompt": "once", "max_tokens": 8, "temperature": 0}


def _request(chance: random.Random) -> tuple[bytes, float]:
    """The bytes of a request, and for how many seconds its client reads the answer."""
    body: dict[str, Any] = {"model": "m", "prompt": "once", "max_tokens": chance.choice((1, 8, 200))}
    body["stream"] = chance.random() < 0.5
    if chance.random() < 0.6:
        fields = (
            *body,
            "temperature",
            "top_p",
            "stop",
            "seed",
            "n",
            "stream_options",
            "messages",
            "logprobs",
            "x",
        )
        body[chance.choice(fields)] = chance.choice(HOSTILE)
    text = json.dumps(body).encode()
    if chance.random() < 0.2:
        text = text[: chance.randrange(len(text))]
    length = len(text) if chance.random() < 0.9 else chance.choice((0, 10**12, -1))
    path = chance.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/models", "/x"))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + text, chance.choice((0.0, 0.05, 1.0, 5.0))


def _ask(port: int, request: bytes, patience: float) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(request)
        if patience:
            client.settimeout(patience)
            while client.recv(4096):
                pass


def _answer(port: int, body: Mapping[str, Any]) -> str:
    to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    to.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = to.getresponse()
    text = answer.read()
    to.close()
    if answer.status != 200:
        raise Broken(f"a plain request is answered with {answer.status}: {text[:200]!r}")
    return str(json.loads(text)["choices"][0]["text"])


@contextlib.contextmanager
def _served(model: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own process, and its port."""
    words = [
        sys.executable,
        "-m",
        "fracbit",
        "serve",
        str(model),
        "--name",
        "m",
        "--port",
        "0",
        "--timeout",
        "20",
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=_as_started_by_hand)
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://127.0.0.1:(\d+)/v1", said)):
            line = process.stderr.readline()
            if not line:
                raise Broken(f"no server: {said[-300:]}")
            said += line
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, int(found[1])
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()


def _as_started_by_hand() -> None:
    """Without the bound of a trial's memory, and with SIGINT, which processes in the background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _resident(process: int | str = "self") -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


USES: dict[str, Callable[[Grounds], Change]] = {
    "threads": eight_threads, "prompts": many_prompts, "server": hostile_clients,
}  # fmt: skip
