"""Removes uploads that nobody continued or published, at the start and then again and again."""

import asyncio
import contextlib
import logging

import sqlalchemy as sa

from loradock_adapters.errors import LoradockError
from loradock_adapters.registry import Registry
from loradock_adapters.uploads import Uploads

log = logging.getLogger("loradock.uploads")

EVERY_S = 600.0


class UploadSweeps:
    """See the top of the file."""

    def __init__(self, uploads: Uploads, registry: Registry, keep_s: float) -> None:
        self._uploads = uploads
        self._registry = registry
        self._every_s = min(EVERY_S, keep_s / 2)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with the first one. Must run inside the event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; what is being removed now is removed."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                removed = await asyncio.to_thread(self._uploads.sweep, self._registry.blobs)
                if removed:
                    log.info("removed %d upload(s) that nobody published in time", removed)
            except (OSError, sa.exc.SQLAlchemyError, LoradockError) as error:
                log.warning("old uploads cannot be removed now: %r", error)
            await asyncio.sleep(self._every_s)
