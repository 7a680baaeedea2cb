"""The store: one row a key, claims that only one driver gets, drivers that die, disks that fill, files that are foreign."""

import os
import platform
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")

import sqlalchemy as sa

from fracbit.errors import FormatError, OutputError
from fracbit.records.recipe import Recipe
from fracbit.records.row import Evaluation, Row, Run, run_key
from fracbit.sweep import store as store_module
from fracbit.sweep.store import OWNERS, Store, export_parquet, open_store


def make_row(model: str = "m", **fields: object) -> Row:
    run = Run(recipe=Recipe(model=model), evaluation=Evaluation(text="t"))
    return Row(key=run_key(run), run=run, **{"status": "done", **fields})  # type: ignore[arg-type]


FULL = make_row(
    parameters=100, weights=80, stored_bits=340, model_bits=660, nll=1.25, perplexity=3.49, window_nll=(1.0, 2.5),
    window_tokens=(1, 2), accuracies={"cloze": 0.5}, notes=("a note",), created="2026-01-01T00:00:00+00:00",
)  # fmt: skip


def wheres(tmp_path: Path) -> list[str]:
    """The SQLite file, and a PostgreSQL database when the environment names one."""
    url = os.environ.get("FRACBIT_POSTGRES")
    return [str(tmp_path / "s.db"), *([url] if url else [])]


def test_a_row_reads_back_as_it_was(tmp_path: Path) -> None:
    for where in wheres(tmp_path):
        with open_store(where) as store:
            assert store.write(FULL)
        with open_store(where) as store:
            assert store.rows() == [FULL]
            assert store.keys() == {FULL.key}


def test_a_row_is_written_once(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        assert store.write(make_row(nll=1.0))
        assert not store.write(make_row(nll=2.0))
        assert [row.nll for row in store.rows()] == [1.0]


def test_failed_rows_are_tried_again_only_on_request(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.write(make_row("bad", status="failed", error="why"))
        store.write(make_row("good"))
        assert [row.error for row in store.rows("failed")] == ["why"]
        assert store.forget_failed(store.keys()) == 1
        assert store.keys() == {make_row("good").key}


def test_one_of_many_gets_a_claim(tmp_path: Path) -> None:
    stores = [open_store(str(tmp_path / "s.db")) for _ in range(4)]
    for store in stores:
        store.join()
    for key in ("a", "b", "c"):
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(lambda store, key=key: store.claim(key), stores)) == 1
    for store in stores:
        store.close()


def test_a_stored_key_cannot_be_claimed(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.join()
        store.write(FULL)
        assert not store.claim(FULL.key)
        assert store.claimed() == set()


def test_writing_a_row_ends_its_claim(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.join()
        assert store.claim(FULL.key)
        store.write(FULL)
        assert store.claimed() == set()


def test_closing_gives_claims_back(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as other:
        with open_store(str(tmp_path / "s.db")) as store:
            store.join()
            store.claim("k")
            assert other.claimed() == {"k"}
        assert other.claimed() == set()


CLAIM_AND_WAIT = """
import sys, time
from fracbit.sweep.store import open_store
store = open_store(sys.argv[1]); store.join(); store.claim("k"); print("claimed", flush=True); time.sleep(60)
"""


def test_claims_of_a_killed_driver_are_recovered_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    where = str(tmp_path / "s.db")
    driver = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, where], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "claimed\n"
    with open_store(where) as store:
        store.join()
        assert store.recover() == 0
        assert not store.claim("k")
        driver.kill()
        driver.wait()
        assert store.recover() == 1
        assert store.claim("k")
    driver.stdout.close()


def test_a_driver_on_another_host_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.join()
        store.claim("k")
        away = sa.update(OWNERS).values(host=platform.node() + "-other", heartbeat=time.time())
        with store.engine.begin() as link:
            link.execute(away)
        assert store.recover() == 0
        with store.engine.begin() as link:
            link.execute(away.values(heartbeat=time.time() - store_module.LEASE - 1))
        assert store.recover() == 1


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HEARTBEAT", 0.05)
    with open_store(str(tmp_path / "s.db")) as store:
        store.join()
        first = heartbeat(store)
        time.sleep(0.4)
        assert heartbeat(store) > first


def heartbeat(store: Store) -> float:
    with store.engine.begin() as link:
        return float(link.scalar(sa.select(OWNERS.c.heartbeat)) or 0)


def test_a_full_disk_is_an_error_with_a_remedy_and_keeps_what_was_stored(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.write(FULL)
        sa.event.listen(store.engine, "begin", lambda link: link.exec_driver_sql("PRAGMA max_page_count=1"))
        with pytest.raises(OutputError, match="free some space"):
            fill(store)
    with open_store(str(tmp_path / "s.db")) as store:
        assert FULL in store.rows()


def fill(store: Store) -> None:
    for index in range(2000):
        store.write(make_row(f"m{index}", notes=("x" * 4000,)))


def test_another_schema_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    where = str(tmp_path / "s.db")
    open_store(where).close()
    with sqlite3.connect(where) as link:
        link.execute("UPDATE fracbit_store SET value = '99'")
    link.close()
    with pytest.raises(FormatError, match=r"schema version 99.*reads 1.*open it with"):
        open_store(where)


def test_foreign_files_are_refused_untouched(tmp_path: Path) -> None:
    text = tmp_path / "notes.db"
    text.write_text("not a database at all, but long enough to look like one " * 40)
    with pytest.raises(FormatError, match="not an SQLite file"):
        open_store(str(text))
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as link:
        link.execute("CREATE TABLE rows (x)")
    link.close()
    with pytest.raises(FormatError, match="no fracbit store"):
        open_store(str(foreign))


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be used"):
        open_store(str(tmp_path / "no" / "folder" / "s.db"))


def test_a_password_is_not_printed() -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg")
    with pytest.raises(OutputError) as caught:
        open_store("postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


def test_export_to_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    export_parquet([FULL, make_row("other")], tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [line["model"] for line in table] == ["m", "other"]
    assert table[0]["window_nll"] == [1.0, 2.5]
    assert table[0]["bits_per_weight"] == pytest.approx(4.25)
    assert not list(tmp_path.glob("*.tmp"))
