"""The store: rows under their keys, in one SQLite file or a PostgreSQL database with the same schema.

A row is written once. Drivers divide the runs by claims: a driver inserts the run's key into `claims`, whose primary
key admits only one driver. It measures the run and replaces the claim by the row in one transaction. A killed driver
leaves claims behind; they are void when its process is gone (same host) or its heartbeat is older than `LEASE` seconds
(other hosts). Rows stay unique in any case: a driver that was declared dead too early finds its key taken and does not
write.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fracbit.errors import FormatError, OutputError, reason_of
from fracbit.records.extras import check_extra, install
from fracbit.records.row import Row, label
from fracbit.records.scheme import scale_label

check_extra("a store", "sqlalchemy", "store", OutputError)  # everything else of fracbit works without it

import sqlalchemy as sa  # noqa: E402
from sqlalchemy import exc  # noqa: E402

SCHEMA_VERSION = 4
"""2 added scale, search and text_sha256; 3 added chain, and a run became a recipe and an evaluation; 4 made labels unique."""
LEASE = 120.0
HEARTBEAT = 15.0
CREATING = 0x66726163  # names PostgreSQL's advisory lock: any number that all drivers share

METADATA = sa.MetaData()
ABOUT = sa.Table(
    "fracbit_store", METADATA, sa.Column("name", sa.String(32), primary_key=True), sa.Column("value", sa.Text)
)
ROWS = sa.Table(
    "rows",
    METADATA,
    sa.Column("key", sa.String(16), primary_key=True),
    sa.Column("status", sa.String(8), nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("dtype", sa.String(32)),
    sa.Column("bits", sa.Integer),
    sa.Column("block", sa.String(32)),
    sa.Column("axis", sa.String(4)),
    sa.Column("offset_kind", sa.String(8)),
    sa.Column("scale", sa.String(32)),
    sa.Column("quantizer", sa.String(64)),
    sa.Column("search", sa.Boolean),
    sa.Column("chain", sa.String(16)),
    sa.Column("correction", sa.String(64)),
    sa.Column("outliers", sa.String(32)),
    sa.Column("seed", sa.BigInteger),
    sa.Column("parameters", sa.BigInteger),
    sa.Column("stored_bits", sa.BigInteger),
    sa.Column("model_bits", sa.BigInteger),
    sa.Column("bits_per_weight", sa.Float),
    sa.Column("bits_per_parameter", sa.Float),
    sa.Column("nll", sa.Float),
    sa.Column("perplexity", sa.Float),
    sa.Column("divergence", sa.Float),
    sa.Column("agreement", sa.Float),
    sa.Column("weight_error", sa.Float),
    sa.Column("accuracies", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("device", sa.Text),
    sa.Column("versions", sa.Text),
    sa.Column("notes", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("created", sa.String(32)),
    sa.Column("text_sha256", sa.String(64)),
    sa.Column("record", sa.Text, nullable=False),  # the whole row as JSON: what `rows` reads back
)
CLAIMS = sa.Table(
    "claims", METADATA,
    sa.Column("key", sa.String(16), primary_key=True),
    sa.Column("owner", sa.String(32), nullable=False, index=True),
)  # fmt: skip
OWNERS = sa.Table(
    "owners", METADATA,
    sa.Column("owner", sa.String(32), primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.BigInteger, nullable=False),
    sa.Column("born", sa.Text, nullable=False),
    sa.Column("heartbeat", sa.Float, nullable=False),
)  # fmt: skip


class Store:
    """An open store. Use `open_store`; `close` it, or use it in a `with` statement."""

    def __init__(self, engine: sa.Engine, where: str) -> None:
        """Wrap an engine whose schema was checked."""
        self.engine, self.where = engine, where
        self.owner: str | None = None
        self._stop = threading.Event()
        self._pulse: threading.Thread | None = None

    def __enter__(self) -> Store:
        """The store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release claims and close."""
        self.close()

    def keys(self) -> set[str]:
        """Keys of all rows, failed ones included."""
        with self._begin() as link:
            return set(link.scalars(sa.select(ROWS.c.key)))

    def rows(self, status: Literal["done", "failed"] | None = None) -> list[Row]:
        """All rows in order of time, or only those with `status`."""
        query = sa.select(ROWS.c.record).order_by(ROWS.c.created, ROWS.c.key)
        if status is not None:
            query = query.where(ROWS.c.status == status)
        with self._begin() as link:
            return [_row(record, self.where) for record in link.scalars(query)]

    def forget_failed(self, keys: Iterable[str]) -> int:
        """Delete the failed rows among `keys`, so that they are tried again; returns how many there were."""
        with self._begin() as link:
            gone = 0
            for batch in _batches(sorted(keys)):
                query = sa.delete(ROWS).where(ROWS.c.status == "failed", ROWS.c.key.in_(batch))
                gone += link.execute(query).rowcount
            return gone

    def join(self) -> None:
        """Become an owner of claims, with a heartbeat of its own until `close`."""
        self.owner = uuid.uuid4().hex
        with self._begin() as link:
            link.execute(sa.insert(OWNERS).values(owner=self.owner, heartbeat=time.time(), **_this_process()))
        self._pulse = threading.Thread(target=self._beat, name="fracbit-heartbeat", daemon=True)
        self._pulse.start()

    def claim(self, key: str) -> bool:
        """Claim `key`; True if no other driver holds it and no row is stored. Atomic over all drivers."""
        try:
            with self._begin() as link:
                link.execute(sa.insert(CLAIMS).values(key=key, owner=self.owner))
        except exc.IntegrityError:
            return False
        # The last holder may have written the row and dropped its claim before ours was inserted.
        with self._begin() as link:
            if link.scalar(sa.select(ROWS.c.key).where(ROWS.c.key == key)) is None:
                return True
            link.execute(sa.delete(CLAIMS).where(CLAIMS.c.key == key, CLAIMS.c.owner == self.owner))
        return False

    def write(self, row: Row) -> bool:
        """Store a row and drop its claim in one transaction. False if the key is stored already; that row stays."""
        try:
            with self._begin() as link:
                link.execute(sa.insert(ROWS).values(**columns_of(row)))
                link.execute(sa.delete(CLAIMS).where(CLAIMS.c.key == row.key))
        except exc.IntegrityError:
            return False
        return True

    def add(self, rows: Iterable[Row]) -> int:
        """Store those rows of another store that are not stored yet; returns how many there were."""
        there = self.keys()
        new = {row.key: row for row in rows if row.key not in there}
        return sum(self.write(row) for row in new.values())

    def recover(self) -> int:
        """Drop the claims of drivers that are gone; returns how many there were."""
        with self._begin() as link:
            owners = link.execute(sa.select(OWNERS)).mappings().all()
            dead = [owner["owner"] for owner in owners if not _is_alive(dict(owner))]
            dropped = link.execute(sa.delete(CLAIMS).where(CLAIMS.c.owner.in_(dead))).rowcount
            link.execute(sa.delete(OWNERS).where(OWNERS.c.owner.in_(dead)))
        return int(dropped)

    def claimed(self) -> set[str]:
        """Keys that a driver has claimed."""
        with self._begin() as link:
            return set(link.scalars(sa.select(CLAIMS.c.key)))

    def close(self) -> None:
        """Release the claims of this driver and close the connection."""
        self._stop.set()
        if self._pulse is not None:
            self._pulse.join()
        if self.owner is not None:
            with self._begin() as link:
                link.execute(sa.delete(CLAIMS).where(CLAIMS.c.owner == self.owner))
                link.execute(sa.delete(OWNERS).where(OWNERS.c.owner == self.owner))
            self.owner = None
        self.engine.dispose()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            # A store that cannot be written raises when the next row is written, in the driver's own thread.
            with suppress(OutputError), self._begin() as link:
                link.execute(
                    sa.update(OWNERS).where(OWNERS.c.owner == self.owner).values(heartbeat=time.time())
                )

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with _explained(self.where), self.engine.begin() as link:
            yield link


def open_store(where: str) -> Store:
    """Open or create a store: a path of an SQLite file, or a URL such as `postgresql://user@host/name`.

    Raises `OutputError` when it cannot be opened or written, `FormatError` when it is something else or of a newer
    version.
    """
    engine = _engine(where)
    with _explained(where):
        _check_schema(engine, where)
    return Store(engine, where)


def _engine(where: str) -> sa.Engine:
    if "://" not in where:
        engine = sa.create_engine(f"sqlite:///{where}", connect_args={"timeout": 60})
        sa.event.listen(engine, "connect", _tune_sqlite)
        sa.event.listen(engine, "begin", _begin_immediate)
        return engine
    url = where.replace("postgres://", "postgresql://", 1).replace(
        "postgresql://", "postgresql+psycopg://", 1
    )
    if not url.startswith(("postgresql", "sqlite")):
        kind = where.partition("://")[0]
        raise OutputError(f"{kind} cannot hold a store: name an SQLite file or postgresql://USER@HOST/NAME")
    try:
        return sa.create_engine(url, pool_pre_ping=True)
    except (exc.ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise OutputError(
            f"store {shown(where)!r} is neither a path nor a database URL: {reason_of(error)}"
        ) from error
    except ImportError as error:
        raise OutputError(f"store {shown(where)}: {error}; {install('postgresql')}") from error


def _tune_sqlite(link: sqlite3.Connection, _: object) -> None:
    link.isolation_level = None  # SQLAlchemy's begin event opens transactions, not the driver
    link.execute("PRAGMA journal_mode=WAL")
    link.execute(
        "PRAGMA synchronous=FULL"
    )  # a stored row survives a power cut; a run takes longer than an fsync


def _begin_immediate(link: sa.Connection) -> None:
    """Take the write lock at once: two drivers that both read and then write would otherwise deadlock."""
    link.exec_driver_sql("BEGIN IMMEDIATE")


def _check_schema(engine: sa.Engine, where: str) -> None:
    tables = set(sa.inspect(engine).get_table_names())
    if ABOUT.name not in tables:
        foreign = tables & {table.name for table in METADATA.sorted_tables}
        if foreign:
            raise FormatError(
                f"{shown(where)} has tables {sorted(foreign)} but is not a fracbit store: name another file"
            )
        with engine.begin() as link:
            _create(link)
        return
    with engine.begin() as link:
        _migrate(link, where)


def _migrate(link: sa.Connection, where: str) -> None:
    """Update an older schema to this one, in the transaction of `link`; a newer one is refused.

    A row's columns are an index of its record. So a migration adds the missing columns and fills all from the records,
    keys included, because a run of version 2 held its calibration outside the recipe.
    """
    chosen = sa.select(ABOUT.c.value).where(ABOUT.c.name == "schema")
    version = link.scalar(chosen.with_for_update())  # another driver may be migrating
    if version == str(SCHEMA_VERSION):
        return
    if version is None or not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise FormatError(
            f"{shown(where)} has schema version {version}, this fracbit reads up to {SCHEMA_VERSION}: open it with the fracbit "
            "that wrote it (`fracbit sweep --export rows.parquet` there, `--import rows.parquet` here), or name another file"
        )
    there = {column["name"] for column in sa.inspect(link).get_columns(ROWS.name)}
    for column in ROWS.columns:
        if column.name not in there:
            kind = column.type.compile(link.dialect)
            link.exec_driver_sql(f'ALTER TABLE rows ADD COLUMN "{column.name}" {kind}')
    held = link.execute(sa.select(ROWS.c.key, ROWS.c.record).order_by(ROWS.c.created)).all()
    taken = {key for key, _ in held}
    for key, record in held:
        row = _row(record, where)
        if row.key != key and row.key in taken:  # one run that an older version measured under several keys
            link.execute(sa.delete(ROWS).where(ROWS.c.key == key))
            continue
        taken.add(row.key)
        link.execute(sa.update(ROWS).where(ROWS.c.key == key).values(**columns_of(row)))
    link.execute(sa.update(ABOUT).where(ABOUT.c.name == "schema").values(value=str(SCHEMA_VERSION)))


def _create(link: sa.Connection) -> None:
    """Create the tables, one driver at a time: several may start on an empty database at once.

    SQLite's write lock is held already. PostgreSQL checks and creates in two steps, so it needs a lock of its own.
    """
    if link.dialect.name == "postgresql":
        link.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATING)))
    METADATA.create_all(link)
    if link.scalar(sa.select(ABOUT.c.value)) is None:
        link.execute(sa.insert(ABOUT).values(name="schema", value=str(SCHEMA_VERSION)))


def _row(record: str, where: str) -> Row:
    try:
        return Row.model_validate_json(record)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise FormatError(
            f"{shown(where)} holds a row that cannot be read ({field}: {fault['msg']}); remove it, or name another store"
        ) from error


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Explain database errors: a full disk, a file that is not a database, a server that does not answer."""
    try:
        yield
    except exc.IntegrityError:
        raise
    except exc.SQLAlchemyError as error:
        reason = reason_of(error.orig if isinstance(error, exc.DBAPIError) and error.orig else error)
        if "full" in reason:
            raise OutputError(
                f"{shown(where)}: {reason}; free some space and start again: stored rows are kept"
            ) from error
        if "not a database" in reason or "malformed" in reason:
            raise FormatError(f"{shown(where)} is not an SQLite file: name another one") from error
        if "readonly" in reason:
            raise OutputError(
                f"store {shown(where)} cannot be written ({reason}); copy it to a place where you may write, and name the copy"
            ) from error
        raise OutputError(f"store {shown(where)} cannot be used: {reason}") from error


def shown(where: str) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", where)


def _this_process() -> dict[str, object]:
    return {"host": platform.node(), "pid": os.getpid(), "born": _born(os.getpid())}


def _is_alive(owner: dict[str, Any]) -> bool:
    if owner["host"] != platform.node():
        return time.time() - float(owner["heartbeat"]) < LEASE
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(_born(int(owner["pid"])) == owner["born"])


def _born(pid: int) -> str:
    """When a process started, in ticks since boot, so that a reused id is recognized; "" where there is no /proc.

    A zombie counts as gone.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "gone" if after_name[0] in "ZX" else after_name[19]


def columns_of(row: Row) -> dict[str, Any]:
    """A row as the columns of `ROWS`; all of them follow from its record.

    They are for queries, and not every setting has one. The whole run (transforms, inputs, choice of the axis, order,
    distillation, embeddings, head, samples) is in `record` under `run`, as JSON; `label` names what differs from the default.
    """
    scheme = row.run.recipe.scheme if row.run.quantized else None
    return {
        "key": row.key,
        "status": row.status,
        "label": label(row.run),
        "model": row.run.recipe.model,
        "dtype": scheme.dtype if scheme else None,
        "bits": scheme.bits if scheme else None,
        "block": str(scheme.block) if scheme else None,
        "axis": scheme.axis if scheme else None,
        "offset_kind": scheme.offset if scheme else None,
        "scale": scale_label(scheme.scale) if scheme else None,
        "quantizer": row.run.recipe.quantizer if scheme else None,
        "search": row.run.recipe.search if scheme else None,
        "correction": row.run.correction,
        "chain": row.run.chain,
        "outliers": str(row.run.recipe.outliers) if row.run.recipe.outliers else None,
        "seed": row.run.recipe.seed,
        "parameters": row.parameters,
        "stored_bits": row.stored_bits,
        "model_bits": row.model_bits,
        "bits_per_weight": row.bits_per_weight,
        "bits_per_parameter": row.bits_per_parameter,
        **{
            name: getattr(row, name)
            for name in ("nll", "perplexity", "divergence", "agreement", "weight_error")
        },
        "accuracies": json.dumps(row.accuracies),
        "seconds": row.seconds,
        "device": row.device,
        "versions": json.dumps(row.versions),
        "notes": json.dumps(row.notes),
        "error": row.error,
        "created": row.created,
        "text_sha256": row.text_sha256,
        "record": row.model_dump_json(),
    }


def _batches(keys: Sequence[str], size: int = 500) -> Iterator[Sequence[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
