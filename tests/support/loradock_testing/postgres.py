"""A real PostgreSQL for tests: a private cluster in a temporary directory, on a free port of this machine.

Started from Debian's package (`apt-get install postgresql`), as another user where the tests run as root. One server
for all tests; each takes a schema of its own, so none sees another's tables. A test that stops the server or breaks it
starts one for itself. Connections need the password that is in the URL.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

USER, PASSWORD = "loradock", "pass-word-of-tests"
START_TIMEOUT_S = 60.0
SERVER_USER = "postgres" if os.geteuid() == 0 else None
"""The server refuses to run as root."""


def find_binaries() -> Path | None:
    """The directory with `initdb` and `postgres`; None where PostgreSQL is not installed."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if newest:
        return newest[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class PostgresServer:
    """One cluster. `stop()` and `start()` keep its data and its port."""

    def __init__(self, root: Path, binaries: Path) -> None:
        self._binaries = binaries
        self._data = root / "data"
        self._log = root / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        if SERVER_USER is not None:
            shutil.chown(root, SERVER_USER)
        password_file = root / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        flags = ("-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync", "--locale=C")
        initdb = (str(binaries / "initdb"), "-D", str(self._data), *flags, f"--pwfile={password_file}")
        subprocess.run(initdb, check=True, user=SERVER_USER, cwd=root, stdout=subprocess.DEVNULL)

    def url(self, database: str, password: str = PASSWORD) -> str:
        """The URL of a database, with the password in it."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Returns when connections are taken."""
        self.port = self.port or _free_port()
        settings = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""}
        settings |= {"fsync": "off", "shared_buffers": "16MB", "max_connections": "100"}
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, *flags],
                user=SERVER_USER,
                cwd=self._data,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """At once, as after a power cut; what was committed is there again after `start()`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def new_database(self) -> str:
        """The URL of an empty place for tables: a schema, which is as good as a database and made in no time."""
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
        return f"{self.url('postgres')}?options=-csearch_path%3D{name}"

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.Error):
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
            return True
        return False


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server, gone at the end with everything in it. FileNotFoundError where PostgreSQL is not installed."""
    binaries = find_binaries()
    if binaries is None:
        raise FileNotFoundError("PostgreSQL is not installed (Debian, Ubuntu: apt install postgresql)")
    root = Path(tempfile.mkdtemp(prefix="loradock-postgres-"))  # pytest's own directories are closed to other users
    try:
        server = PostgresServer(root, binaries)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(root)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
