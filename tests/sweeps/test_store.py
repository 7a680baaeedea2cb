"""The store: one row a key, claims that only one driver gets, drivers that die, disks that fill, files that are foreign."""

import json
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
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.row import Evaluation, Row, Run, run_key
from fracbit.sweeps import store as store_module
from fracbit.sweeps.parquet import export_parquet, import_parquet
from fracbit.sweeps.store import OWNERS, ROWS, SCHEMA_VERSION, Store, open_store


def make_row(model: str = "m", **fields: object) -> Row:
    run = Run(recipe=Recipe(model=model), evaluation=Evaluation(text="t"))
    return Row(key=run_key(run), run=run, **{"status": "done", **fields})  # type: ignore[arg-type]


FULL = make_row(
    parameters=100, weights=80, stored_bits=340, model_bits=660, nll=1.25, perplexity=3.49, window_nll=(1.0, 2.5),
    window_tokens=(1, 2), accuracies={"cloze": 0.5}, notes=("a note",), created="2026-01-01T00:00:00+00:00",
    text_sha256="abc", family="llama", versions={"torch": "2"}, seconds=1.5, evaluation_seconds=1.25,
)  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty SQLite file, or an empty database of a PostgreSQL server that the test starts."""
    if request.param == "sqlite":
        return str(tmp_path / "s.db")
    url: str = request.getfixturevalue("postgresql")
    return url


def test_a_row_reads_back_as_it_was(where: str) -> None:
    with open_store(where) as store:
        assert store.write(FULL)
    with open_store(where) as store:
        assert store.rows() == [FULL]
        assert store.keys() == {FULL.key}


def test_many_drivers_may_start_on_an_empty_store(where: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(open_store, [where] * 8))
    for store in stores:
        with store:
            assert store.keys() == set()


def test_a_row_is_written_once(where: str) -> None:
    with open_store(where) as store:
        assert store.write(make_row(nll=1.0))
        assert not store.write(make_row(nll=2.0))
        assert [row.nll for row in store.rows()] == [1.0]


def test_failed_rows_are_tried_again_only_on_request(where: str) -> None:
    with open_store(where) as store:
        store.write(make_row("bad", status="failed", error="why"))
        store.write(make_row("good"))
        assert [row.error for row in store.rows("failed")] == ["why"]
        assert store.forget_failed(store.keys()) == 1
        assert store.keys() == {make_row("good").key}


def test_one_of_many_gets_a_claim(where: str) -> None:
    stores = [open_store(where) for _ in range(4)]
    for store in stores:
        store.join()
    for key in ("a", "b", "c"):
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(lambda store, key=key: store.claim(key), stores)) == 1
    for store in stores:
        store.close()


def test_a_stored_key_cannot_be_claimed(where: str) -> None:
    with open_store(where) as store:
        store.join()
        store.write(FULL)
        assert not store.claim(FULL.key)
        assert store.claimed() == set()


def test_writing_a_row_ends_its_claim(where: str) -> None:
    with open_store(where) as store:
        store.join()
        assert store.claim(FULL.key)
        store.write(FULL)
        assert store.claimed() == set()


def test_closing_gives_claims_back(where: str) -> None:
    with open_store(where) as other:
        with open_store(where) as store:
            store.join()
            store.claim("k")
            assert other.claimed() == {"k"}
        assert other.claimed() == set()


CLAIM_AND_WAIT = """
import sys, time
from fracbit.sweeps.store import open_store
store = open_store(sys.argv[1]); store.join(); store.claim("k"); print("claimed", flush=True); time.sleep(60)
"""


def test_claims_of_a_killed_driver_are_recovered_and_those_of_a_living_one_are_not(where: str) -> None:
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


def test_a_driver_on_another_host_lives_as_long_as_its_heart_beats(where: str) -> None:
    with open_store(where) as store:
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


def test_a_newer_schema_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    where = str(tmp_path / "s.db")
    open_store(where).close()
    with sqlite3.connect(where) as link:
        link.execute("UPDATE fracbit_store SET value = '99'")
    link.close()
    with pytest.raises(
        FormatError, match=rf"schema version 99.*up to {SCHEMA_VERSION}: open it with.*--import"
    ):
        open_store(where)


def test_an_older_schema_version_is_brought_up(where: str) -> None:
    with open_store(where) as store:
        store.write(FULL)
        store.write(make_row("bad", status="failed", error="why"))
        with store.engine.begin() as link:  # as version 1 left it
            for column in ("scale", "search", "text_sha256"):
                link.exec_driver_sql(f"ALTER TABLE rows DROP COLUMN {column}")
            link.exec_driver_sql("UPDATE fracbit_store SET value = '1'")
    for _ in range(2):
        with open_store(where) as store, store.engine.begin() as link:
            found = link.execute(sa.select(ROWS.c.scale, ROWS.c.search, ROWS.c.text_sha256)).all()
            assert set(found) == {("fp16", False, "abc"), ("fp16", False, "")}
    with open_store(where) as store:
        assert FULL in store.rows()
        assert store.write(make_row("new"))


def test_columns_of_an_older_store_follow_from_its_records(where: str) -> None:
    with open_store(where) as store:
        store.write(FULL)
        with store.engine.begin() as link:  # as version 3 left it, whose labels named less
            link.execute(sa.update(ROWS).values(label="short"))
            link.exec_driver_sql("UPDATE fracbit_store SET value = '3'")
    with open_store(where) as store, store.engine.begin() as link:
        assert link.scalar(sa.select(ROWS.c.label)) == str(FULL.run)


def test_settings_without_a_column_are_in_the_record(where: str) -> None:
    plan = Calibration(texts=("c",), transforms=("smooth",), inputs="int8/token", distill=1, sequential=True)
    run = Run(recipe=Recipe(model="m", calibration=plan), evaluation=Evaluation(text="t"))
    with open_store(where) as store:
        store.write(Row(key=run_key(run), run=run, status="done"))
        with store.engine.begin() as link:
            record = json.loads(link.scalar(sa.select(ROWS.c.record)) or "")
    assert record["run"]["recipe"]["calibration"] == plan.model_dump(mode="json")


def test_foreign_files_are_refused_untouched(tmp_path: Path) -> None:
    text = tmp_path / "notes.db"
    text.write_text("not a database at all, but long enough to look like one " * 40)
    with pytest.raises(FormatError, match="not an SQLite file"):
        open_store(str(text))
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as link:
        link.execute("CREATE TABLE rows (x)")
    link.close()
    with pytest.raises(FormatError, match="not a fracbit store"):
        open_store(str(foreign))


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be used"):
        open_store(str(tmp_path / "no" / "folder" / "s.db"))


def test_other_databases_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(OutputError, match="mysql cannot hold a store: name an SQLite file or postgresql://"):
        open_store("mysql://host/name")


def test_a_password_is_not_printed() -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg")
    with pytest.raises(OutputError) as caught:
        open_store("postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


def test_parquet_holds_rows_whole(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    rows = [FULL, make_row("bad", status="failed", error="why")]
    path = tmp_path / "rows.parquet"
    export_parquet(rows, path)
    table = parquet.read_table(path).to_pylist()
    assert [line["model"] for line in table] == ["m", "bad"]
    assert table[0]["bits_per_weight"] == pytest.approx(4.25)
    assert import_parquet(path) == rows
    assert not list(tmp_path.glob("*.tmp"))
    with open_store(str(tmp_path / "s.db")) as store:
        store.write(rows[0])
        assert [store.add(import_parquet(path)) for _ in range(2)] == [1, 0]
        assert {row.key for row in store.rows()} == {row.key for row in rows}


def test_parquet_that_holds_no_rows_of_ours(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    path = tmp_path / "rows.parquet"
    with pytest.raises(OutputError, match="cannot be read"):
        import_parquet(path)
    path.write_text("not Parquet")
    with pytest.raises(FormatError, match="not a Parquet file"):
        import_parquet(path)
    export_parquet([FULL], path)
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns(["text_sha256"]), path)
    with pytest.raises(FormatError, match=r"lacks the columns \['text_sha256'\]"):
        import_parquet(path)
    parquet.write_table(table.set_column(0, "key", [["0" * 16]]), path)
    with pytest.raises(FormatError, match="measure it again"):
        import_parquet(path)
