"""Which adapters an engine start has been told of, and telling it once.

An engine forgets its adapters when it restarts, and a load runs inside its loop: so every (start, digest) is loaded
exactly once, however many requests ask at the same moment. Loads of different adapters go side by side. Knows nothing
of names or versions.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loradock_serve.engine import EngineStart
from loradock_serve.errors import EngineError, EngineUnavailableError


class Packs(Protocol):
    """Where adapters lie in the form that engines read fastest."""

    async def directory_of(self, digest: str, source: Path, form: str) -> Path | None:
        """A directory with the adapter in `source` in this form (`packed_file.FORMS`); None where there is none."""

    async def discard(self, digest: str) -> None:
        """Remove what is there of a version that is gone."""


class AdapterLoader:
    """Loads adapters into one engine, once for each of its starts."""

    def __init__(
        self, packs: Packs | None = None, on_load: Callable[[str, float], None] = lambda _digest, _seconds: None
    ) -> None:
        """`on_load` is told of each load that succeeded, and how many seconds it took."""
        self._packs = packs
        self._on_load = on_load
        self._start_number = 0
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: dict[str, asyncio.Task[None]] = {}

    def is_loaded(self, digest: str) -> bool:
        """Whether the engine's present start has this adapter."""
        task = self._loads.get(digest)
        return task is not None and task.done() and not _failed(task)

    def is_moving(self, digest: str) -> bool:
        """Whether the engine is being told of this adapter, or to forget it."""
        task = self._loads.get(digest)
        return digest in self._unloads or (task is not None and not task.done())

    async def ensure_loaded(self, start: EngineStart, digest: str, directory: Path) -> None:
        """Returns when the engine has the adapter. Raises what the load raised; the next call then tries again.

        A caller that is cancelled does not cancel the load: others may wait for it.
        """
        if start.number > self._start_number:
            self._start_number, self._loads = start.number, {}
        if start.number < self._start_number:
            raise EngineUnavailableError("The engine has been restarted since this request asked for it")
        task = self._loads.get(digest)
        if task is None or (task.done() and _failed(task)):
            task = asyncio.create_task(self._load(start, digest, directory, self._unloads.get(digest)))
            self._loads[digest] = task
        await asyncio.shield(task)

    def lost(self, start: EngineStart, digest: str) -> None:
        """The engine says that it does not have this adapter: the next call loads it again."""
        if start.number == self._start_number:
            self._loads.pop(digest, None)

    async def unload(self, start: EngineStart, digest: str) -> None:
        """Have the engine forget an adapter and free its weights, if this start has it."""
        if start.number != self._start_number:
            return
        loading = self._loads.pop(digest, None)
        if loading is None:
            return
        # Kept where a load that comes meanwhile finds it: the two must reach the engine in this order.
        task = self._unloads[digest] = asyncio.create_task(_unload(start, digest, loading))
        task.add_done_callback(lambda done: self._unloads.pop(digest) if self._unloads.get(digest) is done else None)
        await asyncio.shield(task)

    async def discard(self, digest: str) -> None:
        """Remove the packed form of a version that is gone, which no engine needs."""
        if self._packs is not None:
            await self._packs.discard(digest)

    async def _load(
        self, start: EngineStart, digest: str, directory: Path, unloading: asyncio.Task[None] | None
    ) -> None:
        if unloading is not None:
            await asyncio.wait([unloading])
        began = time.monotonic()
        await start.client.load_adapter(digest, str(directory), await self._packed(start, digest, directory))
        self._on_load(digest, time.monotonic() - began)

    async def _packed(self, start: EngineStart, digest: str, directory: Path) -> str | None:
        status = start.status
        dtype = status.limits.get("lora_dtype") if status is not None else None
        if self._packs is None or status is None or not isinstance(dtype, str):
            return None
        form = f"{dtype}-cpu" if status.device.startswith("cpu") else dtype
        packed = await self._packs.directory_of(digest, directory, form)
        return None if packed is None else str(packed)


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


async def _unload(start: EngineStart, digest: str, loading: asyncio.Task[None]) -> None:
    await asyncio.wait([loading])
    if not _failed(loading):
        # An engine that is gone, or never had it, has nothing to forget.
        with contextlib.suppress(EngineError):
            await start.client.unload_adapter(digest)
