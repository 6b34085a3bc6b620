"""Keeps this machine's copies of uploads within their budget: the least recently used versions go.

What an engine may read stays: what is in a slot, in its host memory or read ahead, what requests use, what is pinned,
what has an engine of its own, what is being fetched, and whatever was used a moment ago. An engine that still knows the
name of one that goes is made to forget it first: without its files it would end. Where the engine does not say
what it holds, or another gateway uses the same data_dir, nothing goes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.cached_store import CachedStore
from loradock_adapters.errors import LoradockError
from loradock_serve.directories import CachedDirectories
from loradock_serve.errors import ConflictError
from loradock_serve.fleet import Fleet
from loradock_serve.residency import Residency

log = logging.getLogger("loradock.store")

EVERY_S = 10.0
SPARED_S = 60.0
"""What was used within so long stays: a publish or a load may be about to read it."""
LOOK_AGE_S = 5.0
"""How old the engine's word may be of what it holds; what was used since then is spared, too."""


class CacheKeeper:
    """See the top of the file."""

    def __init__(
        self,
        store: CachedStore,
        directories: CachedDirectories,
        fleet: Fleet,
        residency: Residency,
        pinned: Callable[[], Collection[str]],
        alone: Callable[[], AbstractContextManager[None]],
        limit_bytes: int,
    ) -> None:
        """`pinned`: digests that are, or should be, held in slots. `alone`: see `DirectoryUse`."""
        self._store = store
        self._directories = directories
        self._fleet = fleet
        self._residency = residency
        self._pinned = pinned
        self._alone = alone
        self._limit_bytes = limit_bytes
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look from time to time."""
        self._task = asyncio.create_task(self._always(), name="cache of uploads")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def make_room(self) -> list[str]:
        """Remove what has to go; returns its digests. ConflictError where another gateway's engine may read it."""
        used_bytes = await asyncio.to_thread(self._store.used_bytes)
        if used_bytes <= self._limit_bytes:
            return []
        with self._alone():
            return await self._make_room(used_bytes)

    async def _make_room(self, used_bytes: int) -> list[str]:
        held = await self._held_by_engine()
        if held is None:
            return []
        before_s = time.time() - SPARED_S - LOOK_AGE_S
        gone: list[str] = []
        for digest in await asyncio.to_thread(self._store.oldest, before_s):
            if used_bytes <= self._limit_bytes:
                break
            if digest in held or digest in self._needed():
                continue
            async with self._directories.leaving(digest):
                await self._fleet.unload_idle(digest)
                freed_bytes = await asyncio.to_thread(self._store.drop, digest)
            if freed_bytes is not None:
                used_bytes -= freed_bytes
                gone.append(digest)
        if gone:
            log.info("%d version(s) made room on this machine; they are fetched again when asked for", len(gone))
        return gone

    async def _held_by_engine(self) -> Collection[str] | None:
        """What the base's engine has in memory; None where it runs and does not say."""
        if self._fleet.base.current is None:
            return ()
        look = await self._residency.look()
        if look.slots == 0 or self._residency.age_s(look) > LOOK_AGE_S:
            return None
        return look.in_slots | look.in_memory | look.pinned

    def _needed(self) -> Collection[str]:
        return {*self._fleet.used_digests(), *self._pinned(), *self._directories.busy}

    async def _always(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.make_room()
            except ConflictError:
                log.debug("this data_dir is over its budget, and another gateway uses it too")
            except (LoradockError, SQLAlchemyError, OSError) as error:
                log.warning("no room could be made for uploads: %s", error)
