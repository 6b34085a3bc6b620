"""Tells whether the registry's database has changed, by whomever, in microseconds and without asking it.

SQLite counts commits in shared memory. PostgreSQL tells whoever listens: each writing transaction ends with a NOTIFY,
and one thread of this process keeps a connection that LISTENs. While that connection is gone the number stands still
(what is known stays known); when it is back everything counts as changed. Knows no tables.
"""

import contextlib
import logging
import sqlite3
import threading
import time
import uuid
from typing import TYPE_CHECKING, Protocol, cast

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.registry_url import shown

if TYPE_CHECKING:
    import psycopg

log = logging.getLogger("loradock.registry")

WRITES = "loradock_writes"
"""Execution option of connections that mean to write."""
CHANNEL = "loradock_changes"
PROBE = "probe-"
WAIT_S = 0.5
"""How long the listener waits at a time; closing it takes at most that long."""
LOOK_EVERY_S = 5.0
"""How often a connection that is silent is tried."""
PROBE_TIMEOUT_S = 5.0
RETRY_S = 0.2


class Changes(Protocol):
    """Threads may share it."""

    def generation(self) -> int:
        """Another number after a change by any connection. Never waits for the database, and never fails."""

    def close(self) -> None:
        """Let go of the database."""


def changes_of(engine: sa.Engine) -> Changes:
    """The changes of an engine's database."""
    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None
        return SqliteChanges(engine.url.database)
    return PostgresChanges(engine)


class SqliteChanges:
    """The database's own count of commits by others, on a connection that is kept: two connections' cannot be
    compared."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._last = 0

    def generation(self) -> int:
        """See Changes. A database that cannot be read has not changed; the next lookup says what is wrong with it."""
        with self._turn:
            try:
                if self._connection is None:
                    self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
                self._last = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
            except sqlite3.Error as error:
                log.warning("whether the registry has changed cannot be read: %s", error)
            return self._last

    def close(self) -> None:
        """See Changes; whoever asks again gets a new number."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class PostgresChanges:
    """See the top of the file. The thread begins with the first question."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._number = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._listening = threading.Event()
        sa.event.listen(engine, "begin", _announce)
        sa.event.listen(engine, "commit", self._own_change)

    def generation(self) -> int:
        """See Changes."""
        if self._thread is None:
            with self._turn:
                if self._thread is None and not self._stop.is_set():
                    self._thread = threading.Thread(target=self._run, name="loradock-registry", daemon=True)
                    self._thread.start()
        return self._number

    def wait_until_listening(self, timeout_s: float) -> bool:
        """Whether changes of other processes are heard by then."""
        self.generation()
        return self._listening.wait(timeout_s)

    def close(self) -> None:
        """See Changes."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _changed(self) -> None:
        with self._turn:
            self._number += 1

    def _own_change(self, connection: sa.Connection) -> None:
        # Just before the commit; what is told after it makes another number of it.
        if connection.get_execution_options().get(WRITES, False):
            self._changed()

    def _run(self) -> None:
        import psycopg

        while not self._stop.is_set():
            try:
                with contextlib.closing(self._connect()) as connection:
                    self._listen(connection)
            except (SQLAlchemyError, psycopg.Error, OSError) as error:
                if self._listening.is_set() or self._number == 0:
                    log.warning("the registry %s is not heard: %s", shown(self._engine.url), error)
                self._listening.clear()
                self._stop.wait(RETRY_S)

    def _connect(self) -> "psycopg.Connection":
        pooled = self._engine.raw_connection()
        connection = cast("psycopg.Connection", pooled.driver_connection)
        pooled.detach()  # it is never given back
        connection.set_autocommit(True)
        return connection

    def _listen(self, connection: "psycopg.Connection") -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        heard = self._hears(connection)
        if not heard:
            log.warning(
                "PostgreSQL's notices do not come through (a connection pooler in between, perhaps): names are looked "
                "up anew every %g s instead of when they change",
                WAIT_S,
            )
        if self._number and not self._listening.is_set():
            log.info("the registry is heard again")
        self._changed()  # nobody knows what was missed
        self._listening.set()
        looked_at = time.monotonic()
        while not self._stop.is_set():
            news = [note.payload for note in connection.notifies(timeout=WAIT_S, stop_after=1)]
            if any(not payload.startswith(PROBE) for payload in news) or not heard:
                self._changed()
            if not heard or time.monotonic() - looked_at > LOOK_EVERY_S:
                connection.execute("SELECT 1")
                looked_at = time.monotonic()

    def _hears(self, connection: "psycopg.Connection") -> bool:
        """Whether what another connection tells comes through to this one."""
        probe = f"{PROBE}{uuid.uuid4().hex}"
        with self._engine.begin() as other:
            other.execute(sa.select(sa.func.pg_notify(CHANNEL, probe)))
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            if any(note.payload == probe for note in connection.notifies(timeout=left_s, stop_after=1)):
                return True
        return False


def _announce(connection: sa.Connection) -> None:
    """Tells every listener of this transaction, once it is committed, and nobody if it is not."""
    if connection.get_execution_options().get(WRITES, False):
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))
