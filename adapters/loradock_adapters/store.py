"""Where the bytes live: content-addressed blobs, and versions as directories of hard links to them.

    ROOT/blobs/ab/abcd…       one file for each content, read-only, named by its sha256
    ROOT/versions/<hex>/      one directory for each manifest digest, what the engine reads
    ROOT/tmp/                 uploads that are under way

Everything is built under a temporary name, synced and renamed, so that a crash at any point leaves the old state or the
new one. A temporary is locked by whoever writes it; what nobody holds is swept at the start. Does not know names or
pointers (registry.py).
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from loradock_adapters.errors import DigestMismatchError, MissingBlobsError, NotFoundError
from loradock_adapters.manifest import CHUNK_BYTES, FileEntry, Manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_ONLY_FILE = 0o444
_READ_ONLY_DIRECTORY = 0o555
_PARTIAL = ".partial-"


class LocalStore:
    """A store in one directory, which several threads and processes may use at once. The engine needs the same path."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._blobs = self.root / "blobs"
        self._versions = self.root / "versions"
        self._tmp = self.root / "tmp"
        for directory in (self._blobs, self._versions, self._tmp):
            directory.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def has_blob(self, sha256: str) -> bool:
        return self.blob_path(sha256).is_file()

    def blob_path(self, sha256: str) -> Path:
        """Where a content is, or would be. Only 64 hex digits ever become part of a path."""
        if not _SHA256.fullmatch(sha256):
            raise NotFoundError(f"{ascii(sha256)[:80]} is not a sha256: 64 lower-case hex digits")
        return self._blobs / sha256[:2] / sha256

    def missing_blobs(self, manifest: Manifest) -> list[str]:
        return [sha256 for sha256 in manifest.blobs if not self.has_blob(sha256)]

    def writer(self, sha256: str, size_bytes: int | None = None) -> "BlobWriter":
        """Takes one content as it comes. `size_bytes` is its announced size, where there is one."""
        return BlobWriter(self.blob_path(sha256), self._tmp, sha256, size_bytes)

    def take(self, path: Path, sha256: str) -> None:
        """Makes a file on this disk a blob, by moving it. It must have been verified and synced."""
        target = self.blob_path(sha256)
        path.chmod(_READ_ONLY_FILE)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            _sync_directory(self._blobs)
        path.rename(target)
        _sync_directory(target.parent)

    def discard_blob(self, sha256: str) -> None:
        """Removes a content. Versions that were made of it keep theirs: they have links of their own."""
        self.blob_path(sha256).unlink(missing_ok=True)

    def put_file(self, path: Path, entry: FileEntry) -> None:
        """Takes a content from a local file."""
        if self.has_blob(entry.sha256):
            return
        with self.writer(entry.sha256, entry.size_bytes) as writer, path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                writer.write(chunk)

    def put_directory(self, directory: Path, manifest: Manifest) -> Path:
        """Takes a checkpoint from a local directory; the same way as an upload, but for the network."""
        for entry in manifest.files:
            self.put_file(directory / entry.path, entry)
        return self.materialise(manifest)

    def secure(self, manifest: Manifest) -> None:
        """Have the version's contents where whoever may serve it finds them; here they are already."""

    def version_dir(self, digest: str) -> Path:
        """Where the files of a version are, or would be, for `sha256:<64 hex>`."""
        hexdigest = digest.removeprefix("sha256:")
        if not _SHA256.fullmatch(hexdigest):
            raise NotFoundError(f"{ascii(digest)[:80]} is not a digest: sha256: and 64 lower-case hex digits")
        return self._versions / hexdigest

    def has_version(self, digest: str) -> bool:
        return self.version_dir(digest).is_dir()

    def materialise(self, manifest: Manifest) -> Path:
        """The version's directory, made of hard links to its blobs; there whole or not at all.

        Raises MissingBlobsError with every sha256 that is not in the store.
        """
        target = self.version_dir(manifest.digest)
        if target.is_dir():
            return target
        if missing := self.missing_blobs(manifest):
            raise MissingBlobsError(missing)
        # Beside the target and not under tmp/: a read-only directory may be renamed only within its parent.
        with self._partial_directory() as partial:
            self._link(manifest, partial)
            with contextlib.suppress(FileExistsError):
                _rename_directory(partial, target)
        return target

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory on the store's own disk, which is gone in the end, also after a kill."""
        with self._partial_directory() as directory:
            yield directory

    def discard_version(self, digest: str) -> None:
        """Removes a version's directory. Its blobs stay. Only for versions that no engine may read."""
        target = self.version_dir(digest)
        partial = self._versions / f"{_PARTIAL}{uuid.uuid4().hex}"
        try:
            target.rename(partial)
        except FileNotFoundError:
            return
        _remove_tree(partial)

    def stored_versions(self) -> list[str]:
        """The digests of all versions that have a directory."""
        return [f"sha256:{path.name}" for path in self._versions.iterdir() if _SHA256.fullmatch(path.name)]

    def stored_blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every content, and what the disk says of its file."""
        for path in self._blobs.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if _SHA256.fullmatch(path.name):
                    yield path.name, path.stat()

    def inodes_of(self, digest: str) -> set[int]:
        """The files that a version's directory is made of, which its blobs share."""
        return {path.stat().st_ino for path in self.version_dir(digest).rglob("*") if path.is_file()}

    def sweep(self) -> int:
        """Removes the temporaries of writers that are gone; returns how many."""
        removed = 0
        for path in [*self._tmp.iterdir(), *self._versions.glob(f"{_PARTIAL}*")]:
            with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(path):
                _remove_tree(path)
                removed += 1
        return removed

    @contextlib.contextmanager
    def _partial_directory(self) -> Iterator[Path]:
        """An empty, locked directory, which is removed in the end unless it was renamed."""
        with contextlib.ExitStack() as stack:
            while True:
                partial = self._versions / f"{_PARTIAL}{uuid.uuid4().hex}"
                partial.mkdir()
                try:
                    stack.enter_context(_locked(partial))
                except (FileNotFoundError, BlockingIOError):
                    continue  # swept by another process between its making and its locking
                if partial.is_dir():
                    break
            try:
                yield partial
            finally:
                _remove_tree(partial)

    def _link(self, manifest: Manifest, directory: Path) -> None:
        folders = {directory}
        for entry in manifest.files:
            path = directory / entry.path
            if path.parent not in folders:
                path.parent.mkdir()
                folders.add(path.parent)
            blob = self.blob_path(entry.sha256)
            try:
                os.link(blob, path)
            except FileNotFoundError:  # it expired since somebody looked
                raise MissingBlobsError([entry.sha256]) from None
            if (size_bytes := path.stat().st_size) != entry.size_bytes:
                raise DigestMismatchError(
                    f"{entry.path}: the manifest says {entry.size_bytes} bytes, the content has {size_bytes}"
                )
        for folder in folders:
            folder.chmod(_READ_ONLY_DIRECTORY)
            _sync_directory(folder)


class BlobWriter:
    """One content on its way in. Nothing of it is visible before `commit`, and nothing stays after `abort`.

    As a context manager it commits at the end, and aborts on an exception. Not to be shared between threads.
    """

    def __init__(self, target: Path, tmp: Path, sha256: str, size_bytes: int | None) -> None:
        self._target = target
        self._sha256 = sha256
        self._announced_bytes = size_bytes
        self._digest = hashlib.sha256()
        self.written_bytes = 0
        while True:
            self._partial = tmp / f"{sha256[:16]}-{uuid.uuid4().hex}"
            self._file = self._partial.open("xb")
            fcntl.flock(self._file, fcntl.LOCK_EX)  # tells a sweep in another process that somebody is at it
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # swept between its making and its locking

    def write(self, chunk: bytes) -> None:
        """Raises DigestMismatchError as soon as there are more bytes than announced."""
        self.written_bytes += len(chunk)
        if self._announced_bytes is not None and self.written_bytes > self._announced_bytes:
            raise DigestMismatchError(f"more than the announced {self._announced_bytes} bytes were sent")
        self._digest.update(chunk)
        self._file.write(chunk)

    def commit(self) -> None:
        """Makes the content visible under its sha256, once it is known to be that and to be on the disk."""
        try:
            if self._announced_bytes is not None and self.written_bytes != self._announced_bytes:
                raise DigestMismatchError(
                    f"{self.written_bytes} of the announced {self._announced_bytes} bytes were sent"
                )
            if self._digest.hexdigest() != self._sha256:
                raise DigestMismatchError(f"the bytes have the sha256 {self._digest.hexdigest()}, not {self._sha256}")
            self._file.flush()
            os.fchmod(self._file.fileno(), _READ_ONLY_FILE)
            os.fsync(self._file.fileno())
            self._target.parent.mkdir(exist_ok=True)
            self._partial.rename(self._target)
            _sync_directory(self._target.parent)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forgets what was written. Harmless after a commit."""
        self._partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full; the bytes are unwanted anyway
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a temporary; BlockingIOError if its writer does. The system drops it when a process dies."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _rename_directory(partial: Path, target: Path) -> None:
    """Raises FileExistsError if somebody else made the target meanwhile."""
    try:
        partial.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(str(target)) from error
        raise
    _sync_directory(target.parent)


def _remove_tree(path: Path) -> None:
    if path.is_dir():
        for folder in [path, *(inner for inner in path.iterdir() if inner.is_dir())]:
            folder.chmod(0o755)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """A rename is on the disk only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
