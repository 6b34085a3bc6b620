"""A local store whose blobs lie elsewhere, too: what is missing here is fetched, verified and kept.

Each content is fetched once, however many ask for it at the same moment; a download that fails is tried again by
whoever asks next. What is published is put there first. Does not know which versions engines read: whoever does says
what is removed when this disk's share is used up.
"""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from loradock_adapters.blob_store import BlobStore
from loradock_adapters.errors import CorruptBlobError, DigestMismatchError, MissingBlobsError
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.store import LocalStore

log = logging.getLogger("loradock.store")

DOWNLOADS = 16
TRIES = 2
"""Downloads of a content whose bytes are not what its name says, before that is an error."""


class CachedStore(LocalStore):
    """See the top of the file."""

    def __init__(self, root: Path, remote: BlobStore) -> None:
        super().__init__(root)
        self.remote = remote
        self._turn = threading.Lock()
        self._under_way: dict[FileEntry, Future[None]] = {}
        """Also by size: who asks for another one, which is wrong, must not fail the others."""
        self._threads = ThreadPoolExecutor(DOWNLOADS, "loradock-download")
        self._there: set[str] = set()
        """What is known to be in the other store."""

    def materialise(self, manifest: Manifest) -> Path:
        """As LocalStore's; contents that are not here are fetched first.

        Raises MissingBlobsError with what is in neither store, CorruptBlobError and StoreUnavailableError.
        """
        if (target := self.here(manifest.digest)) is not None:
            return target
        self._fetch_missing(manifest)
        try:
            return super().materialise(manifest)
        except MissingBlobsError:  # a version that shares a content with this one made room meanwhile
            self._fetch_missing(manifest)
            return super().materialise(manifest)

    def _fetch_missing(self, manifest: Manifest) -> None:
        entries = {entry.sha256: entry for entry in manifest.files}
        fetching = {sha256: self.fetch(entries[sha256]) for sha256 in self.missing_blobs(manifest)}
        # Also where one failed at once: whoever asks after our error would be handed the others', from before it.
        wait(fetching.values())
        lost = []
        for sha256, future in fetching.items():
            try:
                future.result()
            except FileNotFoundError:
                lost.append(sha256)
        if lost:
            raise MissingBlobsError(lost)

    def fetch(self, entry: FileEntry) -> Future[None]:
        """Have a content fetched; everybody who asks meanwhile gets the same future."""
        content = replace(entry, path="")
        with self._turn:
            future = self._under_way.get(content)
            if future is None:
                future = self._under_way[content] = self._threads.submit(self._fetch, entry)
            return future

    def secure(self, manifest: Manifest) -> None:
        """Put the version's contents into the other store, those that are not there yet."""
        for entry in {entry.sha256: entry for entry in manifest.files}.values():
            if entry.sha256 in self._there:
                continue
            if self.remote.size_bytes(entry.sha256) != entry.size_bytes:
                self.remote.write(entry.sha256, self.blob_path(entry.sha256))
            self._there.add(entry.sha256)

    def used_bytes(self) -> int:
        """What contents take of the disk here."""
        return sum(status.st_size for _, status in self._contents())

    def here(self, digest: str) -> Path | None:
        """A version's directory, which counts as used now; None where it has to be fetched."""
        target = self.version_dir(digest)
        try:
            os.utime(target)
        except FileNotFoundError:
            return None
        return target

    def oldest(self, before_s: float) -> list[str]:
        """Digests of the versions that were not used since then (seconds since 1970), the least recently used first."""
        used: list[tuple[float, str]] = []
        for directory in self._versions.glob("[0-9a-f]*"):
            with contextlib.suppress(FileNotFoundError):
                used.append((directory.stat().st_mtime, f"sha256:{directory.name}"))
        return [digest for used_s, digest in sorted(used) if used_s < before_s]

    def drop(self, digest: str) -> int | None:
        """Remove a version that can be fetched again, and what only it is made of; returns how many bytes that was.

        None where bytes of it are on this machine only: then nothing is removed.
        """
        mine = self._contents_of(self.version_dir(digest))
        if not all(self._is_elsewhere(sha256, status.st_size) for sha256, status in mine):
            return None
        self.discard_version(digest)
        freed_bytes = 0
        for sha256, _ in mine:
            path = self.blob_path(sha256)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_nlink == 1:
                    path.unlink()
                    freed_bytes += status.st_size
        return freed_bytes

    def _fetch(self, entry: FileEntry) -> None:
        try:
            if not self.has_blob(entry.sha256):  # by another gateway on this directory, or a moment ago
                self._download(entry)
        finally:
            with self._turn:
                del self._under_way[replace(entry, path="")]

    def _download(self, entry: FileEntry) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                with self.writer(entry.sha256, entry.size_bytes) as writer:
                    for chunk in self.remote.read(entry.sha256, entry.size_bytes):
                        writer.write(chunk)
            except DigestMismatchError as error:
                log.error("%s in the store of uploads is not as published (try %d): %s", entry.sha256, attempt, error)
            else:
                self._there.add(entry.sha256)
                return
        there_bytes = self.remote.size_bytes(entry.sha256)
        if there_bytes is not None and there_bytes != entry.size_bytes and self._is_sound(entry.sha256, there_bytes):
            raise DigestMismatchError(
                f"{entry.path}: the manifest says {entry.size_bytes} bytes, the content has {there_bytes}"
            )
        raise CorruptBlobError(
            f"The bytes of {entry.path} (blobs/{entry.sha256[:2]}/{entry.sha256}) in the store of uploads are not the "
            f"ones that were published, twice in a row: nothing of them is served. Remove that object and push again"
        )

    def _is_sound(self, sha256: str, size_bytes: int) -> bool:
        """Whether what lies in the other store is what its name says."""
        digest = hashlib.sha256()
        for chunk in self.remote.read(sha256, size_bytes):
            digest.update(chunk)
        return digest.hexdigest() == sha256

    def _contents(self) -> Iterator[tuple[str, os.stat_result]]:
        for path in self._blobs.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                yield path.name, path.stat()

    def _contents_of(self, directory: Path) -> list[tuple[str, os.stat_result]]:
        """The contents that a version is made of: its files are links to them."""
        inodes = {path.stat().st_ino for path in directory.rglob("*") if path.is_file()}
        return [(sha256, status) for sha256, status in self._contents() if status.st_ino in inodes]

    def _is_elsewhere(self, sha256: str, size_bytes: int) -> bool:
        if sha256 not in self._there and self.remote.size_bytes(sha256) == size_bytes:
            self._there.add(sha256)
        return sha256 in self._there
