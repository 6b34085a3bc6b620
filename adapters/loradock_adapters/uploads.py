"""Uploads that nobody has published yet: contents on their way in, and whole ones that no version names.

    ROOT/uploads/<publisher>/<sha256>.<total bytes>          what has come so far
    ROOT/uploads/<publisher>/<sha256>.<total bytes>.whole    empty: the store has it, this publisher brought it

The names are the whole bookkeeping: limits hold across restarts, and for gateways that share a directory. What came of
a content is kept until it is continued or expires; who writes to it holds its lock, and the system drops that when the
process dies. Nothing here is visible before its sha256 was verified and the store took it. Does not know HTTP.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from loradock_adapters.errors import (
    DigestMismatchError,
    NoRoomError,
    UploadBusyError,
    UploadQuotaError,
    WrongOffsetError,
)
from loradock_adapters.manifest import CHUNK_BYTES, Manifest
from loradock_adapters.store import LocalStore

CHEAP_TO_RESEND_BYTES = 64 * 1024**2
"""Of an upload that was refused, contents up to this size are dropped at once. Larger ones stay until they expire: who
mends a config need not send the weights once more."""
MAX_RESERVE_BYTES = 64 * 1024**2
"""Uploads leave a hundredth of the disk to the registry and the logs, at most this much."""
_NAME = re.compile(r"([0-9a-f]{64})\.(\d{1,20})(\.whole)?")
_PUBLISHER = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_WHOLE = ".whole"


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Of each publisher, over everything it has uploaded and not published."""

    max_bytes: int
    """Announced sizes together."""
    max_files: int
    keep_s: float
    """How long after its last byte an upload is kept."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of the bookkeeping."""

    path: Path
    sha256: str
    total_bytes: int
    is_whole: bool


class Uploads:
    """The uploads beside one store. Threads may share it, and processes may share the directory."""

    def __init__(self, store: LocalStore, limits: UploadLimits) -> None:
        self._store = store
        self._limits = limits
        self._root = store.root / "uploads"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._open: set[Upload] = set()
        """Being written by this process now: room that is promised."""
        self._publishing: Counter[str] = Counter()
        self._published_meanwhile: set[str] | None = None
        """While contents are collected: those of every publish that was under way since that began."""

    def held_bytes(self, publisher: str, sha256: str, total_bytes: int | None = None) -> int:
        """How much of a content is here: of the announced size, or the most of any."""
        wanted = [entry for entry in self._entries(publisher) if entry.sha256 == sha256 and not entry.is_whole]
        sizes = [_size_bytes(entry.path) for entry in wanted if total_bytes in (None, entry.total_bytes)]
        return max(sizes, default=0)

    def check(self, publisher: str, sha256: str, total_bytes: int) -> None:
        """Whether there is room for a content of an announced size. Raises UploadQuotaError, NoRoomError."""
        others = [entry for entry in self._entries(publisher) if entry.sha256 != sha256]
        if len(others) >= self._limits.max_files:
            raise UploadQuotaError(
                f"{len(others)} uploaded files wait to be published, and {self._limits.max_files} may: {self._way_out}"
            )
        waiting_bytes = sum(entry.total_bytes for entry in others)
        if waiting_bytes + total_bytes > self._limits.max_bytes:
            raise UploadQuotaError(
                f"{total_bytes} bytes more beside the {waiting_bytes} that wait to be published are over the limit "
                f"of {self._limits.max_bytes}: {self._way_out}"
            )
        missing_bytes = total_bytes - self.held_bytes(publisher, sha256, total_bytes)
        room_bytes = self._room_bytes(publisher, sha256)
        if missing_bytes > room_bytes:
            raise NoRoomError(
                f"The server's disk has no room: {missing_bytes} bytes are still to come, and {max(0, room_bytes)} are "
                "free. Nothing is lost: free some room under its `data_dir`, then send this again"
            )

    @property
    def _way_out(self) -> str:
        return (
            f"publish or wait (what nobody published is dropped after {self._limits.keep_s:.0f} s), or raise "
            "`uploads.max_unpublished_bytes` or `max_unpublished_files` on the server"
        )

    def _room_bytes(self, publisher: str, sha256: str) -> int:
        """What is free and not promised to other uploads that run now."""
        with self._lock:
            others = [upload for upload in self._open if (upload.publisher, upload.sha256) != (publisher, sha256)]
        return free_bytes(self._root) - sum(upload.missing_bytes for upload in others)

    def begin(self, publisher: str, sha256: str, total_bytes: int, offset: int | Literal["end"] | None) -> "Upload":
        """Opens a content for writing at `offset`, which must be the end of what is here; None begins anew.

        What is here already is hashed again, which takes about a second a gigabyte. Raises UploadQuotaError,
        NoRoomError, UploadBusyError, WrongOffsetError.
        """
        if offset is None:
            self._begin_anew(publisher, sha256, total_bytes)
        self.check(publisher, sha256, total_bytes)
        directory = self._directory(publisher)
        directory.mkdir(exist_ok=True)
        upload = Upload(self, directory / f"{sha256}.{total_bytes}", publisher, sha256, total_bytes)
        try:
            if isinstance(offset, int) and offset != upload.held_bytes:
                raise WrongOffsetError(sha256, offset, upload.held_bytes)
            if offset is None:
                upload.truncate()
            with self._lock:
                self._open.add(upload)
            upload.hash_again()
        except BaseException:
            upload.close()
            raise
        return upload

    def _begin_anew(self, publisher: str, sha256: str, total_bytes: int) -> None:
        """What is here of it does not count against the room: it goes, unless somebody writes to it."""
        with contextlib.suppress(FileNotFoundError):
            _remove_unless_locked(self._directory(publisher) / f"{sha256}.{total_bytes}")

    def take(self, upload: "Upload") -> None:
        """A verified content becomes one of the store's blobs."""
        upload.path.with_name(upload.path.name + _WHOLE).touch()
        self._store.take(upload.path, upload.sha256)

    def closed(self, upload: "Upload") -> None:
        with self._lock:
            self._open.discard(upload)

    @contextlib.contextmanager
    def publishing(self, sha256s: Collection[str]) -> Iterator[None]:
        """While a version of these contents is on its way, none of them is dropped."""
        with self._lock:
            self._publishing.update(sha256s)
            if self._published_meanwhile is not None:
                self._published_meanwhile.update(sha256s)
        try:
            yield
        finally:
            with self._lock:
                self._publishing.subtract(sha256s)
                self._publishing += Counter()  # forgets the zeros

    def published(self, sha256s: Collection[str]) -> None:
        """A version names these now: they count for nobody any more, and never expire."""
        for publisher in self._publishers():
            for entry in self._entries(publisher):
                if entry.is_whole and entry.sha256 in sha256s:
                    entry.path.unlink(missing_ok=True)

    def collect(self, unneeded: Callable[[], Iterable[str]]) -> list[str]:
        """Drops contents that no version needs, and returns them. One collection at a time.

        `unneeded` is asked once everything that is published from then on is watched: what a publish has taken since,
        and what an upload waits to be published with, stays.
        """
        with self._lock:
            self._published_meanwhile = {sha256 for sha256, publishes in self._publishing.items() if publishes}
        dropped: list[str] = []
        try:
            candidates = list(unneeded())
            waiting = self.waiting()
            for sha256 in candidates:
                with self._lock:
                    if sha256 not in waiting and sha256 not in self._published_meanwhile:
                        self._store.discard_blob(sha256)
                        dropped.append(sha256)
        finally:
            with self._lock:
                self._published_meanwhile = None
        return dropped

    def waiting(self) -> set[str]:
        """The contents that were uploaded, or begun, and that nobody has published yet."""
        return {entry.sha256 for publisher in self._publishers() for entry in self._entries(publisher)}

    def refused(self, publisher: str, manifest: Manifest, needed: Callable[[], Collection[str]]) -> None:
        """Drops what this publisher brought for a version that was refused, where it is cheap to send again."""
        cheap = {sha256 for sha256, size_bytes in manifest.blobs.items() if size_bytes <= CHEAP_TO_RESEND_BYTES}
        mine = [entry for entry in self._entries(publisher) if entry.is_whole and entry.sha256 in cheap]
        self._drop(mine, needed() if mine else ())

    def sweep(self, needed: Callable[[], Collection[str]]) -> int:
        """Removes what has expired, but for contents that a version needs; returns how many."""
        old_s = time.time() - self._limits.keep_s
        entries = [entry for publisher in self._publishers() for entry in self._entries(publisher)]
        whole = [entry for entry in entries if entry.is_whole]
        names = needed() if whole else ()
        for entry in whole:
            if entry.sha256 in names or not self._store.has_blob(entry.sha256):
                entry.path.unlink(missing_ok=True)
        removed = self._drop([entry for entry in whole if _changed_s(entry.path) < old_s], names)
        for entry in entries:
            if not entry.is_whole and _changed_s(entry.path) < old_s:
                with contextlib.suppress(FileNotFoundError, UploadBusyError):
                    _remove_unless_locked(entry.path)
                    removed += 1
        return removed

    def _drop(self, entries: Iterable[_Entry], needed: Collection[str]) -> int:
        """Whole contents leave the store. A version's directory has links of its own: it keeps them in any case."""
        dropped = 0
        for entry in entries:
            with self._lock:
                if self._publishing[entry.sha256] or not entry.path.exists():
                    continue
                if entry.sha256 not in needed:
                    self._store.discard_blob(entry.sha256)
                    dropped += 1
                entry.path.unlink(missing_ok=True)
        return dropped

    def _directory(self, publisher: str) -> Path:
        if not _PUBLISHER.fullmatch(publisher):
            raise ValueError(f"{publisher!r} cannot be a publisher's directory")
        return self._root / publisher

    def _publishers(self) -> list[str]:
        return [entry.name for entry in os.scandir(self._root) if _PUBLISHER.fullmatch(entry.name)]

    def _entries(self, publisher: str) -> list[_Entry]:
        return list(_read(self._directory(publisher)))


class Upload:
    """One content while it is written. Locked from beginning to `close`, which keeps what came for another time.

    Threads may share it: `close` waits for what they do, and what comes after it does nothing.
    """

    def __init__(self, uploads: Uploads, path: Path, publisher: str, sha256: str, total_bytes: int) -> None:
        """Raises UploadBusyError while another one writes to it."""
        self.path = path
        self.publisher = publisher
        self.sha256 = sha256
        self._total_bytes = total_bytes
        self._uploads = uploads
        self._turn = threading.Lock()
        self._digest = hashlib.sha256()
        self._descriptor = _open_locked(path)
        self.held_bytes = os.fstat(self._descriptor).st_size

    @property
    def missing_bytes(self) -> int:
        return max(0, self._total_bytes - self.held_bytes)

    def truncate(self) -> None:
        """Forgets what came."""
        os.ftruncate(self._descriptor, 0)
        self.held_bytes = 0

    def hash_again(self) -> None:
        """Brings the running sha256 to the end of what is held: it does not outlive its process."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        while chunk := os.read(self._descriptor, CHUNK_BYTES):
            self._digest.update(chunk)

    def write(self, chunks: Sequence[bytes]) -> None:
        """Appends. Raises DigestMismatchError for more than was announced, OSError where the disk is full."""
        more_bytes = sum(map(len, chunks))
        if more_bytes > self.missing_bytes:
            raise DigestMismatchError(f"more than the announced {self._total_bytes} bytes were sent")
        if more_bytes > free_bytes(self.path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        with self._turn:
            if self._descriptor < 0:
                return
            try:
                for chunk in chunks:
                    _write_all(self._descriptor, chunk)
                    self._digest.update(chunk)
                    self.held_bytes += len(chunk)
            except OSError:
                os.ftruncate(self._descriptor, self.held_bytes)  # no half chunk, of which the digest knows nothing
                raise

    def finish(self) -> None:
        """Hands the content to the store. Raises DigestMismatchError, and forgets it, if it is another one."""
        if self.held_bytes != self._total_bytes:
            raise DigestMismatchError(f"{self.held_bytes} of the announced {self._total_bytes} bytes were sent")
        if self._digest.hexdigest() != self.sha256:
            self.path.unlink(missing_ok=True)
            raise DigestMismatchError(f"the bytes have the sha256 {self._digest.hexdigest()}, not {self.sha256}")
        os.fsync(self._descriptor)
        self._uploads.take(self)

    def close(self) -> None:
        """Lets the next writer in. Harmless when done twice."""
        with self._turn:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                self._uploads.closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def free_bytes(directory: Path) -> int:
    """What uploads may still write to this disk."""
    disk = os.statvfs(directory)
    reserve_bytes = min(MAX_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 100)
    return disk.f_bavail * disk.f_frsize - reserve_bytes


def _read(directory: Path) -> Iterator[_Entry]:
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as found:
        for file in found:
            if match := _NAME.fullmatch(file.name):
                yield _Entry(Path(file.path), match[1], int(match[2]), match[3] is not None)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor, path)
            if os.fstat(descriptor).st_nlink and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # finished, or swept, between its opening and its locking
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_unless_locked(path: Path) -> None:
    """Raises UploadBusyError, FileNotFoundError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _lock(descriptor, path)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):  # somebody began it anew between these lines
            raise UploadBusyError(path.name.partition(".")[0])
        path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UploadBusyError(path.name.partition(".")[0]) from None


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _size_bytes(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _changed_s(path: Path) -> float:
    """When it was written last; far in the future for what is gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return float("inf")
