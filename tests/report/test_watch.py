"""`fracbit report --watch`: the page from a local server, made again when rows come."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")

from fracbit.errors import OutputError
from fracbit.records.recipe import Recipe
from fracbit.records.row import Evaluation, Row, Run, run_key
from fracbit.report.watch import watching


def row(bits: int) -> Row:
    run = Run(recipe=Recipe(model="m", scheme=f"int{bits}/64"), evaluation=Evaluation(text="folder/text.txt"))
    return Row(
        key=run_key(run), run=run, status="done", parameters=1000, weights=900, stored_bits=900 * bits,
        model_bits=1600 + 900 * bits, nll=2.0, perplexity=7.4, window_nll=(2.0,), window_tokens=(1,), text_sha256="0" * 64,
    )  # fmt: skip


@contextmanager
def served(rows: list[Row]) -> Iterator[int]:
    with watching(lambda: rows, "A <study>", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    to = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    to.request("GET", path, headers={} if host is None else {"Host": host})
    answer = to.getresponse()
    found = answer.status, answer.read().decode()
    to.close()
    return found


def test_the_page_follows_the_store() -> None:
    rows: list[Row] = []
    with served(rows) as port:
        status, text = get(port, "/")
        assert status == 200
        assert "no finished row" in text
        for bits in (3, 4):
            rows.append(row(bits))
            status, text = get(port, "/")
            assert status == 200
            assert all(each.key in text for each in rows)
            assert f'const version = "{get(port, "/version")[1]}"' in text
            assert text.index("location.reload()") < text.rindex("</body>")


def test_other_names_and_places_are_refused() -> None:
    with served([row(4)]) as port:
        assert get(port, "/", f"attacker.example:{port}")[0] == 403
        assert get(port, "/../store.db")[0] == 404
        with pytest.raises(OutputError, match=f"port {port} cannot be listened on"):
            watching(list, "title", port)
