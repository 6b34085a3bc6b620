"""The registry's database: its tables, how it is connected to, and how it is brought up to date.

The tables here are what the newest migration makes; a test compares the two. Knows no rules about names or versions.
"""

import contextlib
import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.errors import RegistryError

_BUSY_TIMEOUT_S = 30
_MIGRATION_LOCK = 0x10AD0C  # one of PostgreSQL's advisory locks
WRITES = "loradock_writes"
"""Execution option of connections that mean to write: on SQLite they take the write lock at once."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A moment in UTC. SQLite drops the zone; it is put back on reading."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


metadata = sa.MetaData()

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String(96), primary_key=True),
    sa.Column("current_number", sa.Integer, nullable=True),  # null: deleted; the row stays for last_number
    sa.Column("last_number", sa.Integer, nullable=False),  # numbers are never given out twice, not even after a delete
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("name", sa.String(96), sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(71), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("placement", sa.String(16), nullable=False),
    sa.Column("reasons", sa.JSON, nullable=False),
    sa.Column("rank", sa.Integer, nullable=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("chat_template", sa.Text, nullable=True),
    sa.Column("stop_token_ids", sa.JSON, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("base", sa.JSON(none_as_null=True), nullable=True),  # null: from before 0002, not claimed yet
    sa.Column("proof", sa.JSON(none_as_null=True), nullable=True),  # what an engine showed; null: nobody asked one
    sa.Column("repairs", sa.JSON(none_as_null=True), nullable=True),  # null: from before 0004
    sa.Column("source", sa.Text, nullable=True),
    sa.Column("publisher", sa.Text, nullable=True),
    sa.Index("versions_by_digest", "digest"),
)

pins = sa.Table(
    "pins",
    metadata,
    sa.Column("name", sa.String(96), sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

tags = sa.Table(
    "tags",
    metadata,
    sa.Column("name", sa.String(96), primary_key=True),
    sa.Column("tag", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
)

splits = sa.Table(
    "splits",
    metadata,
    sa.Column("name", sa.String(96), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("weight", sa.Integer, nullable=False),  # its share is this of the sum over the name
    sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
)

traffic = sa.Table(
    "traffic",
    metadata,
    sa.Column("hour", sa.Integer, primary_key=True),  # whole hours since 1970, UTC
    sa.Column("digest", sa.String(71), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
)

traffic_hours = sa.Table(
    "traffic_hours",
    metadata,
    sa.Column("hour", sa.Integer, primary_key=True),
    sa.Column("peak_adapters", sa.Integer, nullable=False),  # the most adapters that had requests at one moment
)


def open_database(url: str) -> sa.Engine:
    """An engine on an up-to-date database. Several processes may do this at once. Raises RegistryError."""
    try:
        engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine)
        with _one_at_a_time(engine):
            _migrate(engine)
    except (SQLAlchemyError, OSError) as error:
        shown = sa.engine.make_url(url).render_as_string(hide_password=True)
        raise RegistryError(f"the registry {shown} cannot be opened: {error}") from error
    return engine


def _prepare_sqlite(engine: sa.Engine) -> None:
    if engine.url.database in (None, "", ":memory:"):
        raise RegistryError("the registry needs a file: an in-memory database is another one for every thread")

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, so that also DDL is inside them
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # in WAL mode NORMAL may forget the last commits

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A reader that turns writer in mid-transaction fails at once when another wrote meanwhile: lock first.
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Changes:
    """Tells whether the database has changed, in microseconds on SQLite. Threads may share it."""

    def __init__(self, engine: sa.Engine) -> None:
        self._file = engine.url.database if engine.dialect.name == "sqlite" else None
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def generation(self) -> int:
        """Another number after a change by any connection; where the database cannot say, another one each second."""
        if self._file is None:
            return int(time.monotonic())
        with self._turn:
            if self._connection is None:  # one that is kept: the figures of two connections cannot be compared
                self._connection = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Let go of the database; whoever asks again gets a new number."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


@contextlib.contextmanager
def _one_at_a_time(engine: sa.Engine) -> Iterator[None]:
    """Lets one process at a time look at the schema and change it."""
    if engine.dialect.name != "sqlite":
        yield  # PostgreSQL is locked inside the migration's own transaction
        return
    with Path(f"{engine.url.database}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.connect() as connection:
            connection.rollback()
            raw = connection.connection.driver_connection
            assert raw is not None
            raw.execute("PRAGMA journal_mode = WAL")
        yield


def _migrate(engine: sa.Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            known = ScriptDirectory.from_config(config).get_current_head()
            raise RegistryError(
                f"the registry was made by a newer Loradock (this one knows schemas up to {known}): {error}"
            ) from error
