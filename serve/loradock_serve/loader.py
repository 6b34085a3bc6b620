"""Which adapters an engine start has been told of, and telling it once.

An engine forgets its adapters when it restarts, and a load runs inside its loop: so every (start, digest) is loaded
exactly once, however many requests ask at the same moment. Knows nothing of names or versions.
"""

import asyncio
import time
from pathlib import Path

from loradock_serve.engine import EngineStart
from loradock_serve.metrics import ADAPTER_LOAD_SECONDS


class AdapterLoader:
    """Loads adapters into one engine, once for each of its starts."""

    def __init__(self) -> None:
        self._start_number = 0
        self._loads: dict[str, asyncio.Task[None]] = {}

    def is_loaded(self, digest: str) -> bool:
        """Whether the engine's present start has this adapter."""
        task = self._loads.get(digest)
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    async def ensure_loaded(self, start: EngineStart, digest: str, directory: Path) -> None:
        """Returns when the engine has the adapter. Raises what the load raised; the next call then tries again.

        A caller that is cancelled does not cancel the load: others may wait for it.
        """
        if start.number != self._start_number:
            self._start_number, self._loads = start.number, {}
        task = self._loads.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(_load(start, digest, directory))
            self._loads[digest] = task
        await asyncio.shield(task)

    async def unload(self, start: EngineStart, digest: str) -> None:
        """Have the engine forget an adapter and free its weights, if this start has it."""
        if start.number == self._start_number and self._loads.pop(digest, None) is not None:
            await start.client.unload_adapter(digest)


async def _load(start: EngineStart, digest: str, directory: Path) -> None:
    began = time.monotonic()
    await start.client.load_adapter(digest, str(directory))
    ADAPTER_LOAD_SECONDS.observe(time.monotonic() - began)
