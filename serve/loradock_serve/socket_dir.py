"""The directory of one gateway's engine sockets: made, held while the gateway lives, removed after it.

A gateway that was killed cannot remove its own, so the next one does. Whether a directory has an owner is not guessed
from its age or from what lies in it: the owner holds a lock (`flock`) on the directory itself, which the system drops
when the process dies. (Such a lock also keeps systemd-tmpfiles from clearing what is old in /tmp.) Knows no engines.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger("loradock.gateway")

PREFIX = "loradock."
"""Gateways that took no lock on theirs called them `loradock-` and eight characters: those are left alone."""


class SocketDir:
    """One gateway's own. A Unix socket's path has room for 107 bytes: not under a data_dir that may be deep."""

    def __init__(self, parent: Path | None = None) -> None:
        """Makes it, in the system's directory for temporary files unless `parent` is given."""
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(path, descriptor):
                break
            os.close(descriptor)  # another gateway's start took it for a leftover before it was locked
        self.path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Remove it, with whatever is left in it. Harmless when done twice."""
        if self._descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = None


def remove_leftovers(parent: Path | None = None) -> list[Path]:
    """Remove the directories of gateways that are gone, of this user; which they were."""
    removed = []
    for path in sorted(Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):  # not ours, no directory, gone by now, or held by its owner
            if _remove_unowned(path):
                removed.append(path)
    if removed:
        log.info(
            "removed %d folder(s) of sockets of gateways that are gone: %s", len(removed), ", ".join(map(str, removed))
        )
    return removed


def _remove_unowned(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_still(path, descriptor):
            return False
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()
    finally:
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to what is open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
