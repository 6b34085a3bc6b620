"""The directories of versions, for whoever reads their files: here already, or fetched first.

However many ask for a version at the same moment, it is fetched once; who stops waiting stops nobody else. A version
that is about to be removed to make room is waited for, and fetched anew. Threads do the work: nothing here waits for a
network. Does not know engines.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from loradock_adapters.cached_store import CachedStore
from loradock_adapters.errors import CorruptBlobError, MissingBlobsError
from loradock_adapters.manifest import Manifest
from loradock_adapters.registry import Version
from loradock_adapters.store import LocalStore

log = logging.getLogger("loradock.store")

FETCHES = 16
"""Versions that are fetched side by side; more wait for one of them to end."""


class Directories(Protocol):
    """See the top of the file."""

    async def get(self, version: Version) -> Path:
        """The version's directory, with all its files. Raises StoreUnavailableError or CorruptBlobError."""


class LocalDirectories:
    """Those of a store that has everything."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    async def get(self, version: Version) -> Path:
        """See Directories."""
        return self._store.version_dir(version.digest)


class CachedDirectories:
    """Those of a store that may have to fetch. Used by one event loop."""

    def __init__(self, store: CachedStore, manifest_of: Callable[[Version], Manifest]) -> None:
        """`manifest_of` asks the registry."""
        self._store = store
        self._manifest_of = manifest_of
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._leaving: dict[str, asyncio.Event] = {}
        self._threads = ThreadPoolExecutor(FETCHES, "loradock-fetch")

    @property
    def busy(self) -> frozenset[str]:
        """Digests of what is being fetched."""
        return frozenset(self._fetching)

    async def get(self, version: Version) -> Path:
        """See Directories."""
        digest = version.digest
        while (leaving := self._leaving.get(digest)) is not None:
            await leaving.wait()
        if (here := self._store.here(digest)) is not None:
            return here
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = asyncio.create_task(self._fetch(version), name=f"fetch {digest}")
            task.add_done_callback(lambda done: self._fetched(digest, done))
        return await asyncio.shield(task)

    @contextlib.asynccontextmanager
    async def leaving(self, digest: str) -> AsyncIterator[None]:
        """While the block runs nobody is given this version's directory."""
        left = self._leaving[digest] = asyncio.Event()
        try:
            yield
        finally:
            del self._leaving[digest]
            left.set()

    async def _fetch(self, version: Version) -> Path:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ready, version)

    def _fetched(self, digest: str, done: asyncio.Task[Path]) -> None:
        del self._fetching[digest]
        if not done.cancelled() and (error := done.exception()) is not None:  # perhaps nobody waits any more
            log.warning("%s could not be fetched: %s", digest, error)

    def _ready(self, version: Version) -> Path:
        try:
            return self._store.materialise(self._manifest_of(version))
        except MissingBlobsError as error:
            raise CorruptBlobError(
                f"{version.ref} was published, and {len(error.missing)} of its files are not in the store of uploads "
                f"any more, the first is {error.missing[0]}: push it again"
            ) from error
