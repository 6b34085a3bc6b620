"""`loradock serve` as a process of its own that is up in two seconds: attached to a fake engine. For tests that kill
it.

with fake_engine(root) as url, loradock_server(base, data_dir, engine={"url": url}) as server: ...
"""

import contextlib
import hashlib
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loradock_adapters.manifest import Manifest
from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_testing.needs import NAMESPACES, missing

SUPPORT = Path(__file__).parent.parent
START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def fake_engine(root: Path, prefix: Sequence[str] = ()) -> Iterator[str]:
    """A fake engine, alive until the block ends; yields what `engine.url` says. `prefix` as for `loradock_server`."""
    path = root / "engine.sock"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "loradock_testing.fake_engine", "--uds", str(path), "--served-model-name", "base"]
    process = subprocess.Popen([*prefix, *command], env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            assert process.poll() is None, f"the fake engine ended with {process.returncode}"
            assert time.monotonic() < deadline, "the fake engine did not start"
            time.sleep(0.05)
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few megabytes, in a mount namespace of its own."""

    prefix: tuple[str, ...]
    """Words before a command that is to see it."""
    path: Path
    """Where such a command finds it."""
    root: Path
    """Where this process finds it."""

    @property
    def free_bytes(self) -> int:
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Takes all the room, but for so much."""
        with (self.root / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while (room_bytes := self.free_bytes - leave_bytes) > 0:
                file.write(bytes(min(room_bytes, 1 << 20)))

    def empty(self) -> None:
        """Gives the room back."""
        (self.root / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mounts it until the block ends. Needs no root: a user namespace may mount a tmpfs."""
    path.mkdir(parents=True)
    script = 'mount -t tmpfs -o "size=$1" tmpfs "$0" && echo mounted && exec sleep infinity'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(path), str(size_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stderr is not None
            told = holder.stdout.readline()
            if told != "mounted\n":
                missing(NAMESPACES, f"no user namespace may mount a file system here: {holder.stderr.read().strip()}")
            prefix = ("nsenter", "--preserve-credentials", "--user", "--mount", f"--target={holder.pid}")
            yield SmallDisk(prefix, path, Path(f"/proc/{holder.pid}/root{path}"))
        finally:
            holder.kill()


def free_port() -> int:
    """A port that nobody has: for a gateway that has to come back where it was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Auditor:
    """Looks whether what lies under a data_dir, with no gateway on it, is whole. Hashes each file once."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._hashed: dict[tuple[int, int], str] = {}

    def audit(self) -> dict[str, Manifest]:
        """Digest -> manifest of every version; AssertionError where anything is not as it must be."""
        database = self._data_dir / "registry.sqlite"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        store = LocalStore(self._data_dir)
        registry = Registry(f"sqlite:///{database}")
        try:
            found = {}
            for name in {version.name for version in registry.models()}:
                numbers = [version.number for version in registry.versions(name)]
                assert len(set(numbers)) == len(numbers)
                for version in registry.versions(name):
                    found[version.digest] = registry.manifest(version)
                    assert found[version.digest].digest == version.digest
        finally:
            registry.close()
        for digest, manifest in found.items():
            for entry in manifest.files:
                path = store.version_dir(digest) / entry.path
                assert (path.stat().st_size, self._hash(path)) == (entry.size_bytes, entry.sha256), path
        for path in (self._data_dir / "blobs").glob("??/*"):
            assert self._hash(path) == path.name
        assert not list((self._data_dir / "versions").glob(".partial*")), "the start sweeps them"
        return found

    def _hash(self, path: Path) -> str:
        """Once for each inode: a version's files are links to blobs, and nobody writes to those."""
        about = path.stat()
        key = (about.st_ino, about.st_mtime_ns)
        if key not in self._hashed:
            self._hashed[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashed[key]
