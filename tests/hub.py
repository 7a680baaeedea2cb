"""A stand-in of the hub's HTTP interface on this machine: the files of a folder as a repository, and what was asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class Hub:
    """A repository `name` (owner/name) with the files of `folder`; what was asked: method, path and bytes that were sent."""

    name: str
    folder: Path
    url: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def sent(self, ending: str) -> int:
        """Bytes that were sent of files whose name ends so."""
        return sum(size for method, path, size in self.asked if method == "GET" and path.endswith(ending))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that is to ask it."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The files, as the hub lists them."""
        files = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "2" * 40}
            for path in files
        ]

    def told(self, path: str, body: bytes) -> Any:
        """The answer of the interface to a path, None where it has none."""
        api = f"/api/models/{self.name}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": entry["path"]} for entry in self.entries]
            return {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings}
        if path.startswith(f"{api}/tree/"):
            return self.entries
        if path.startswith(f"{api}/paths-info/"):
            wanted = json.loads(body)["paths"]
            return [entry for entry in self.entries if entry["path"] in wanted]
        return None


class Answers(BaseHTTPRequestHandler):
    """Answers with a `Hub`, which is `server.hub`."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        return found

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/{self.hub.name}/resolve/"):
            self.file(self.hub.folder / path.rpartition("/")[2])
            return
        told = self.hub.told(path, body)
        if told is None:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        facts = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        span = self.headers.get("Range")
        if span is None:
            self.send(200, data, facts)
            return
        start, _, end = span.removeprefix("bytes=").partition("-")
        last = min(int(end or len(data) - 1), len(data) - 1)
        facts["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        self.send(206, data[int(start) : last + 1], facts)

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.hub.asked.append((self.command, urlsplit(self.path).path, len(data)))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def hub(name: str, folder: Path) -> Iterator[Hub]:
    """Serve a repository while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found = Hub(name, folder, f"http://127.0.0.1:{server.server_port}")
    server.hub = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
