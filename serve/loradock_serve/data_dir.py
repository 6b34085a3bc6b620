"""The directory that a gateway keeps everything in: made, tried, and held by one gateway that starts engines.

What cannot work is found here, before anything starts, and told as a ServeConfigError. Knows nothing of what lies in
the directory.
"""

import contextlib
import fcntl
import os
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loradock_serve.errors import ConflictError, ServeConfigError

LOCK_NAME = "gateway.lock"
USERS_NAME = "users.lock"
PARTS = ("blobs", "versions", "uploads", "tmp", "logs", "merged", "packed")
"""What the store, the engines and the merges write into."""


def prepare_data_dir(data_dir: Path) -> None:
    """Make the directory and its parts, and try what they have to do. Raises ServeConfigError with what to do."""
    try:
        for part in PARTS:
            place = data_dir / part
            place.mkdir(parents=True, exist_ok=True)
            _try_to_write(place)
    except OSError as error:
        raise ServeConfigError(
            f"data_dir: {data_dir} cannot be used: {error.strerror}: {error.filename}; give this server's user a "
            "directory of its own that it may write (`--data-dir`), or `chown -R` this one to that user"
        ) from error
    _try_to_link(data_dir)


def _try_to_write(place: Path) -> None:
    trial = place / f".trial-{uuid.uuid4().hex}"
    trial.touch()
    trial.unlink()


def _try_to_link(data_dir: Path) -> None:
    """Versions are hard links to blobs: the two must be on one file system, and it must have them."""
    name = f".trial-{uuid.uuid4().hex}"
    source, target = data_dir / "blobs" / name, data_dir / "versions" / name
    try:
        source.touch()
        os.link(source, target)
    except OSError as error:
        raise ServeConfigError(
            f"data_dir: {data_dir} cannot be used: it has no hard links from blobs/ to versions/ ({error.strerror}); "
            "put all of it on one local file system (ext4, xfs, btrfs, tmpfs)"
        ) from error
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


class GatewayLock:
    """Held by the one gateway that starts engines on a data_dir; the system drops it when the process dies.

    Two of them would overwrite each other's logs and merges. A gateway attached to an engine takes none.
    """

    def __init__(self, data_dir: Path) -> None:
        """Raises ServeConfigError that names the process which holds it."""
        path = data_dir / LOCK_NAME
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ServeConfigError(f"data_dir: {path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            raise ServeConfigError(
                f"data_dir: {data_dir} is in use by another gateway, {holder}: stop that one, give this one a "
                "`--data-dir` of its own, or attach it to the other's engine (`engine.url`)"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let the next gateway in. Harmless when done twice."""
        self._file.close()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    text = file.read(32).strip()
    return f"process {text}" if text.isdigit() else "whose process id is not known"


class DirectoryUse:
    """That a gateway uses a data_dir, told to all others on it for as long as the process lives.

    Each knows its own engines only, so nobody may remove files that engines read unless it is alone.
    """

    def __init__(self, data_dir: Path) -> None:
        """Waits for whoever is alone on it at this moment."""
        self._descriptor = os.open(data_dir / USERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._inside = 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps others from coming. ConflictError where there are some. Several may be alone together in here."""
        if self._inside:
            with self._counted():
                yield
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # trying for the other kind gave this one up
            raise ConflictError(
                "Another gateway uses this data_dir, and its engine may read files that no name has any more: stop all "
                "but one, then collect there"
            ) from error
        with self._counted():
            yield

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """The last one to leave lets others in again."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Use it no more. Harmless when done twice."""
        self._close()
