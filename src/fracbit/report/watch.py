"""The report from a local server, made again when the store has new rows; the open page then reloads itself. Torch-free."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fracbit.errors import DataError, FracbitError, OutputError
from fracbit.records.row import Row
from fracbit.report.page import page

HOST = "127.0.0.1"
EVERY = 5  # seconds between the page's questions
RELOADS = """<script>
const version = "VERSION";
setInterval(async () => {
  const answer = await fetch("/version").catch(() => null);
  if (answer && answer.ok && (await answer.text()) !== version) location.reload();
}, MILLISECONDS);
</script>"""
RowReader = Callable[[], Sequence[Row]]
"""Reads the rows of the store as they are now."""


class Watched:
    """The page of a store that grows. State: the last page and what it was made of."""

    def __init__(self, rows: RowReader, title: str) -> None:
        self.rows, self.title = rows, title
        self.version, self.text, self.lock = "", "", threading.Lock()

    def current(self) -> str:
        """What the store holds now, in one word."""
        return str(len(self.rows()))

    def page(self) -> str:
        """The page, made again where rows came; before the first row, a page that waits for it. Raises as `report.page`."""
        with self.lock:
            rows = self.rows()
            if self.version != str(len(rows)):
                self.text, self.version = self._made(rows), str(len(rows))
            return self.text

    def _made(self, rows: Sequence[Row]) -> str:
        reloads = RELOADS.replace("VERSION", str(len(rows))).replace("MILLISECONDS", str(1000 * EVERY))
        try:
            text = page(rows, self.title)
        except DataError as error:
            text = f"<!doctype html><title>{html.escape(self.title)}</title><p>{html.escape(str(error))}</p></body>"
        head, end, rest = text.rpartition("</body>")
        return head + reloads + end + rest


def watching(rows: RowReader, title: str, port: int) -> ThreadingHTTPServer:
    """A server of the page on this machine; call its `serve_forever`. Raises `OutputError` for a port that is taken."""
    watched = Watched(rows, title)

    class Answers(BaseHTTPRequestHandler):
        """`/` and `/version`."""

        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN, "this server answers to its own name only")
                return
            if self.path not in ("/", "/version"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                text = watched.page() if self.path == "/" else watched.current()
            except FracbitError as error:
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
                return
            body = text.encode("utf-8", "xmlcharrefreplace")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8" if self.path == "/" else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Requests are nobody's concern."""

    try:
        return ThreadingHTTPServer((HOST, port), Answers)
    except (OSError, OverflowError) as error:
        raise OutputError(
            f"port {port} cannot be listened on ({error}); name another with --port, or 0"
        ) from error
