"""From a listing to blobs in the store: each file streamed, resumed where it breaks off, and verified.

Blocks: runs in a thread, and looks between two pieces whether it shall end. A file whose hash the listing has goes
straight into the store's writer; any other one through a nameless temporary, since a blob is named by its hash. What a
killed process leaves is what it had finished: whole blobs, which the next try finds. Knows no names and no engines.
"""

import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from loradock_adapters.errors import DigestMismatchError
from loradock_adapters.manifest import CHUNK_BYTES, FileEntry, Manifest
from loradock_adapters.store import LocalStore
from loradock_serve.errors import SourceUnavailableError, StorageFullError
from loradock_serve.source_listing import Listing, RemoteFile, Source

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses before a file that broke off goes on; they begin anew with each byte that came."""


class Watch:
    """How far a fetch is, until when it may take, and whether somebody ended it. Threads may share it."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.done_bytes = 0
        self.total_bytes = 0
        self._timeout_s = timeout_s
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._ended = threading.Event()

    def end(self) -> None:
        """Have the fetch break off at its next piece."""
        self._ended.set()

    def check(self) -> None:
        """Raises SourceUnavailableError where it shall not go on."""
        if self._ended.is_set():
            raise SourceUnavailableError("The fetch was broken off: this server stops")
        if self._clock() > self._deadline:
            raise SourceUnavailableError(f"The fetch took longer than {self._timeout_s:g} s (`sources.timeout_s`)")

    def pause(self, seconds: float) -> None:
        """Sleeps, unless it is ended."""
        self._ended.wait(seconds)
        self.check()


class Fetcher:
    """Brings the files of one listing into the store."""

    def __init__(
        self, store: LocalStore, source: Source, watch: Watch, *, retry_waits_s: Sequence[float] = RETRY_WAITS_S
    ) -> None:
        self._store = store
        self._source = source
        self._watch = watch
        self._retry_waits_s = tuple(retry_waits_s)

    def fetch(self, listing: Listing, files: Sequence[RemoteFile]) -> Manifest:
        """The manifest of `files`, all of them in the store. Raises SourceError, StorageFullError."""
        self._watch.total_bytes = sum(file.size_bytes for file in files)
        self._check_room(files)
        manifest = Manifest(tuple(self._entry(listing, file) for file in files))
        if not self._source.still_is(listing):
            raise SourceUnavailableError(f"{listing.source} was written to while it was read; push it once more")
        return manifest

    def _check_room(self, files: Sequence[RemoteFile]) -> None:
        wanted = sum(file.size_bytes for file in files if not self._has(file))
        free = shutil.disk_usage(self._store.root).free
        if wanted > free:
            raise StorageFullError(f"The source has {wanted} bytes, and the server's disk {free} free; none were taken")

    def _has(self, file: RemoteFile) -> bool:
        return file.sha256 is not None and self._store.has_blob(file.sha256)

    def _entry(self, listing: Listing, file: RemoteFile) -> FileEntry:
        self._watch.check()
        try:
            return self._kept(listing, file) if file.sha256 is None else self._streamed(listing, file, file.sha256)
        except DigestMismatchError as error:
            raise SourceUnavailableError(
                f"{listing.source}: {file.path} is not what the listing says: {error}"
            ) from error

    def _streamed(self, listing: Listing, file: RemoteFile, sha256: str) -> FileEntry:
        if self._has(file):
            self._watch.done_bytes += file.size_bytes
        else:
            with self._store.writer(sha256, file.size_bytes) as writer:
                for chunk in self._chunks(listing, file):
                    writer.write(chunk)
        return FileEntry(file.path, file.size_bytes, sha256)

    def _kept(self, listing: Listing, file: RemoteFile) -> FileEntry:
        """A file whose sha256 nobody said. The temporary has no name: it goes with this process, whatever happens."""
        digest = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        with tempfile.TemporaryFile(dir=self._store.root / "tmp") as temporary:
            for chunk in self._chunks(listing, file):
                digest.update(chunk)
                git.update(chunk)
                temporary.write(chunk)
            if file.git_sha1 is not None and git.hexdigest() != file.git_sha1:
                raise DigestMismatchError(f"its bytes are the git blob {git.hexdigest()}, not {file.git_sha1}")
            sha256 = digest.hexdigest()
            if not self._store.has_blob(sha256):
                temporary.seek(0)
                with self._store.writer(sha256, file.size_bytes) as writer:
                    while chunk := temporary.read(CHUNK_BYTES):
                        writer.write(chunk)
        return FileEntry(file.path, file.size_bytes, sha256)

    def _chunks(self, listing: Listing, file: RemoteFile) -> Iterator[bytes]:
        """The bytes of a file, exactly as many as were listed, over as many connections as it takes."""
        done = 0
        waits = iter(self._retry_waits_s)
        while done < file.size_bytes:
            before = done
            trouble = SourceUnavailableError(
                f"{listing.source}: {file.path} broke off at {done} of {file.size_bytes} bytes"
            )
            try:
                for chunk in self._source.read(listing, file, done):
                    self._watch.check()
                    done += len(chunk)
                    if done > file.size_bytes:
                        raise DigestMismatchError(f"more than the {file.size_bytes} bytes that were listed came")
                    self._watch.done_bytes += len(chunk)
                    yield chunk
            except SourceUnavailableError as error:
                self._watch.check()
                trouble = error
            if done < file.size_bytes:
                waits = iter(self._retry_waits_s) if done > before else waits
                wait_s = next(waits, None)
                if wait_s is None:
                    raise trouble
                self._watch.pause(wait_s)
