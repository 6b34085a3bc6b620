"""Writes what the ledger counted into the registry: every few minutes and at the end, never on a request's way.

A gateway that is killed loses the minutes since the last time, which sizing can do without. (Each write also makes
every gateway on the registry look names up anew once: a reason not to write more often.)
"""

import asyncio
import contextlib
import logging

from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.registry import Registry
from loradock_serve.ledger import Ledger

log = logging.getLogger("loradock.gateway")

EVERY_S = 300.0
MAX_KEPT = 100
"""Pieces that are kept while the database cannot be written; older ones are given up."""


class TrafficRecord:
    """The task that writes, and its last time at the end."""

    def __init__(self, ledger: Ledger, registry: Registry) -> None:
        self._ledger = ledger
        self._registry = registry
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    def start(self) -> None:
        """Begin to write from time to time."""
        self._task = asyncio.create_task(self._write_always(), name="traffic record")

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.write()

    async def write(self) -> None:
        """Write what was counted so far. A database that cannot be written is told, and tried again next time."""
        async with self._turn:
            traffic = self._ledger.take_traffic()
            if not traffic:
                return
            try:
                await asyncio.to_thread(self._registry.traffic.add, traffic)
            except SQLAlchemyError as error:
                log.warning("what was asked of each adapter could not be recorded: %s", error)
                self._ledger.give_back(traffic[-MAX_KEPT:])

    async def _write_always(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.write()
