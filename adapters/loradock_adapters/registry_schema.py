"""The registry's database: its tables, how it is connected to, and how it is brought up to date.

The tables here are what the newest migration makes; a test compares the two. Knows no rules about names or versions.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.errors import RegistryError
from loradock_adapters.registry_changes import WRITES
from loradock_adapters.registry_url import CONNECT_TIMEOUT_S, connect_arguments, parse_url, shown

_BUSY_TIMEOUT_S = 30
_MIGRATION_LOCK = 0x10AD0C  # one of PostgreSQL's advisory locks
_MIGRATION_TIMEOUT_S = 120


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


def open_database(text: str) -> sa.Engine:
    """An engine on an up-to-date database. Several processes may do this at once. Raises RegistryError."""
    url = parse_url(text)
    engine = _make_engine(url)
    with contextlib.ExitStack() as undo:
        undo.callback(engine.dispose)
        try:
            with _one_at_a_time(engine):
                _migrate(engine)
        except (SQLAlchemyError, OSError) as error:
            raise RegistryError(f"the registry {shown(url)} cannot be opened: {error}") from error
        undo.pop_all()
    return engine


def _make_engine(url: sa.URL) -> sa.Engine:
    if url.drivername == "sqlite":
        engine = sa.create_engine(url)
        _prepare_sqlite(engine)
        return engine
    try:
        return sa.create_engine(
            url, connect_args=connect_arguments(url), pool_pre_ping=True, pool_timeout=CONNECT_TIMEOUT_S
        )
    except ImportError as error:
        raise RegistryError("a registry on PostgreSQL needs its driver: pip install 'loradock[postgres]'") from error


def _prepare_sqlite(engine: sa.Engine) -> None:
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


def insert_into(connection: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what happens to a row which is there already."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return insert(table)


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
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_MIGRATION_TIMEOUT_S}s'")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            known = ScriptDirectory.from_config(config).get_current_head()
            raise RegistryError(
                f"the registry was made by a newer Loradock (this one knows schemas up to {known}): {error}"
            ) from error
