"""`fracbit serve` under many clients of OpenAI's library, some of which go away in the middle of a stream (docs/serving.md).

    python bench/serve.py CHECKPOINT [--minutes 10] [--json bench/results/serve.json]

Starts the server and seventeen clients, one more than it takes at once: chats and completions, streamed and not. Greedy answers
are compared with those to a client alone; a tenth of the requests are streams that are left after a few pieces. Refusals count.
Needs the packages openai, starlette and uvicorn.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from frame import RESULTS, arguments, table, write_json

CLIENTS, ALONE = 16, 8
SUBJECTS = ("the sea", "a clock", "winter", "bread", "a bridge", "light", "a map", "music")
STARTED = re.compile(r"(http://\S+/v1)")


def main() -> None:
    parser = arguments(__doc__, minutes=10.0, json=RESULTS / "serve.json")
    parser.add_argument("checkpoint", help="a model with a chat template")
    given = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "fracbit",
        "serve",
        given.checkpoint,
        "--port",
        "0",
        "--name",
        "model",
        "--deterministic",
    ]
    with subprocess.Popen(
        [*command, "--batch", str(CLIENTS), "--queue", "0"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            said = ""
            while not (found := STARTED.search(said)):
                said = server.stderr.readline()
                if not said:
                    raise SystemExit("the server did not start")
            result = measure(found[1], server.pid, 60 * given.minutes)
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate()
    result["server ended with"] = server.returncode
    write_json(given.json, result)
    table("what | value", [(key, value) for key, value in result.items() if not isinstance(value, dict)])


def measure(url: str, process: int, seconds: float) -> dict[str, Any]:
    alone = [ask(url, subject, random.Random(0), "whole")[1] for subject in SUBJECTS[:ALONE]]
    begun, memory = time.monotonic(), resident(process)
    rows: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    threads = [
        threading.Thread(target=client, args=(url, number, begun + seconds, alone, rows, kinds))
        for number in range(CLIENTS + 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    time.sleep(3)  # rows of clients that went away are free at the next token
    health = json.load(urllib.request.urlopen(url.removesuffix("/v1") + "/health"))
    first = sorted(row["first"] for row in rows if row["first"])
    return {
        "clients": CLIENTS + 1,
        "seconds": round(took, 1),
        "requests": sum(kinds.values()),
        **{kind: kinds[kind] for kind in sorted(kinds)},
        "tokens": sum(row["tokens"] for row in rows),
        "tokens per second": round(sum(row["tokens"] for row in rows) / took, 1),
        "seconds to the first text, median": round(first[len(first) // 2], 3),
        "seconds to the first text, largest": round(first[-1], 3),
        "memory before, MB": round(memory / 1e6),
        "memory after, MB": round(resident(process) / 1e6),
        "at work after": health["running"] + health["waiting"],
        "health": health["status"],
    }


def client(
    url: str, number: int, until: float, alone: list[str], rows: list[dict[str, Any]], kinds: Counter[str]
) -> None:
    import openai

    chance = random.Random(number)
    while time.monotonic() < until:
        place = chance.randrange(ALONE)
        how = chance.choices(("whole", "stream", "left", "drawn"), (3, 4, 1, 2))[0]
        try:
            row, text = ask(url, SUBJECTS[place], chance, how)
        except openai.RateLimitError:
            kinds["refused"] += 1
            time.sleep(0.2)
            continue
        except openai.OpenAIError as error:
            kinds[f"failed: {type(error).__name__}"] += 1
            continue
        rows.append(row)
        kinds[how] += 1
        if how in ("whole", "stream") and text != alone[place]:
            kinds["other text than alone"] += 1


def ask(url: str, subject: str, chance: random.Random, how: str) -> tuple[dict[str, Any], str]:
    """One request: its row, and its text."""
    import openai

    to = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    said = [{"role": "user", "content": f"Tell me something about {subject}."}]
    begun = time.monotonic()
    if how == "drawn":
        seed = chance.randrange(1000)
        made = to.completions.create(
            model="model", prompt=f"About {subject}:", max_tokens=chance.randrange(1, 96), seed=seed
        )
        return {"first": 0.0, "tokens": made.usage.completion_tokens}, made.choices[0].text
    plan: dict[str, Any] = {"model": "model", "messages": said, "max_tokens": 64, "temperature": 0}
    if how == "whole":
        answer = to.chat.completions.create(**plan)
        return {"first": 0.0, "tokens": answer.usage.completion_tokens}, answer.choices[0].message.content
    text, first, pieces = "", 0.0, 0
    leave = chance.randrange(1, 20) if how == "left" else 0
    with to.chat.completions.create(stream=True, **plan) as stream:
        for chunk in stream:
            new = chunk.choices[0].delta.content or ""
            first = first or time.monotonic() - begun
            text, pieces = text + new, pieces + 1
            if pieces == leave:
                break
    return {"first": first, "tokens": pieces}, text


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
