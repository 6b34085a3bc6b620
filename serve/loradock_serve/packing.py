"""The packed forms of adapters on this machine's disk: made once, kept while there is room.

    data_dir/packed/<hex of the version's digest>-<form>.<n>/     see packed_file.py; n: its VERSION

They are copies that can be made again: an engine which finds one gone reads the version's own directory. So the least
recently used go when `limit_bytes` is reached, whoever may use them, and a mapped one lives on until the engine lets go
of it. Made under a temporary name and renamed whole; used at once and synced later (the syncs take several times as
long as the packing), so that one without its mark is made again after a restart. The threads that make them step back
for the engine's, which share the cores of a machine without a GPU.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loradock_adapters.errors import LoradockError
from loradock_serve.packed_file import FORMS, VERSION, NotPackableError, Recipe, is_whole, sync

log = logging.getLogger("loradock.packing")

PACKERS = 2
PACKER_NICENESS = 10
PARTIAL, GONE = ".partial-", ".gone-"


class PackedAdapters:
    """See the top of the file."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._making: dict[Path, asyncio.Task[Path | None]] = {}
        self._seen: set[Path] = set()
        """Those that this process made or looked at."""
        self._packers = ThreadPoolExecutor(PACKERS, "loradock-packer", initializer=_step_back)
        self._syncer = ThreadPoolExecutor(1, "loradock-syncer", initializer=_step_back)
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)

    async def directory_of(self, digest: str, source: Path, form: str) -> Path | None:
        """Where an engine that wants it in this form reads the adapter in `source` fastest: made now if need be.

        None where it had best read `source` in vLLM's own way: nothing can be gained, or there is no room.
        """
        if self._limit_bytes == 0 or form not in FORMS:
            return None
        target = self._target(digest, form)
        task = self._making.get(target)
        if task is None:
            task = self._making[target] = asyncio.create_task(self._in_thread(source, target, form))
            task.add_done_callback(lambda _task: self._making.pop(target, None))
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Returns when everything made until now is on the disk."""
        await asyncio.get_running_loop().run_in_executor(self._syncer, lambda: None)

    def packed(self) -> dict[str, list[Path]]:
        """What is on the disk, by the version's digest."""
        found: dict[str, list[Path]] = {}
        for path in self._root.iterdir():
            if not path.name.startswith("."):
                found.setdefault(f"sha256:{path.name.partition('-')[0]}", []).append(path)
        return found

    async def discard(self, digest: str) -> None:
        """Remove what was made of a version that is gone."""
        loop = asyncio.get_running_loop()
        for form in FORMS:
            await loop.run_in_executor(self._packers, self._remove, self._target(digest, form))

    def _target(self, digest: str, form: str) -> Path:
        return self._root / f"{digest.removeprefix('sha256:')}-{form}.{VERSION}"

    async def _in_thread(self, source: Path, target: Path, form: str) -> Path | None:
        return await asyncio.get_running_loop().run_in_executor(self._packers, self._ready, source, target, form)

    def _ready(self, source: Path, target: Path, form: str) -> Path | None:
        try:
            if self._is_there(target):
                return target
            recipe = Recipe(source, form)
            if not recipe.is_needed:
                return source
            self._make(recipe, target)
        except NotPackableError as error:
            log.info("%s is left as it is: %s", source, error)
        except (OSError, LoradockError, ValueError, KeyError, TypeError) as error:
            # It is only a faster copy; the engine reads the adapter itself, and says what is wrong with that.
            log.warning("%s cannot be packed, so engines read it as it is: %r", source, error)
        else:
            return target
        return None

    def _is_there(self, target: Path) -> bool:
        """Whether it is there and whole; it counts as used now."""
        if target not in self._seen and target.is_dir() and not is_whole(target):
            log.warning("%s is damaged, or was not on the disk for certain: it is made again", target)
            self._remove(target)
        with contextlib.suppress(FileNotFoundError):
            os.utime(target)
            self._seen.add(target)
            return True
        return False

    def _make(self, recipe: Recipe, target: Path) -> None:
        partial = self._root / f"{PARTIAL}{os.getpid()}-{uuid.uuid4().hex}"
        partial.mkdir()
        try:
            recipe.write(partial)
            with contextlib.suppress(FileExistsError):
                _rename(partial, target)
                self._syncer.submit(_sync, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._seen.add(target)
        self._make_room(target)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used, but for the one that is about to be used."""
        sizes = {path: _size_bytes(path) for path in self._root.iterdir() if not path.name.startswith(".")}
        total = sum(sizes.values())
        for path in sorted(sizes.keys() - {newest}, key=_used_s):
            if total <= self._limit_bytes:
                return
            total -= sizes[path]
            self._remove(path)

    def _remove(self, target: Path) -> None:
        """At once for whoever looks for it, and then from the disk."""
        self._seen.discard(target)
        gone = self._root / f"{GONE}{os.getpid()}-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            target.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PACKER_NICENESS)


def _rename(partial: Path, target: Path) -> None:
    """Raises FileExistsError where another gateway was quicker."""
    try:
        partial.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(str(target)) from error
        raise


def _sync(target: Path) -> None:
    try:
        sync(target)
    except FileNotFoundError:
        pass  # it had to make room meanwhile
    except OSError as error:
        log.warning("%s is not on the disk for certain, and is made again after a restart: %s", target, error)


def _sweep(root: Path) -> None:
    """Remove what processes left behind that ended half-way; another gateway's work is its own."""
    for path in [*root.glob(f"{PARTIAL}*"), *root.glob(f"{GONE}*")]:
        pid = path.name.removeprefix(PARTIAL).removeprefix(GONE).partition("-")[0]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _size_bytes(directory: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in directory.iterdir())
    return 0


def _used_s(directory: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return directory.stat().st_mtime
    return 0.0
