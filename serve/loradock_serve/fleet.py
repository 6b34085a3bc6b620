"""All engines of this gateway: the base's, and a few dedicated ones that come and go with their traffic.

`async with fleet.lease(version, …) as target` is the only way to an engine: it starts what does not run, loads what
is not loaded, and keeps what is in use from being stopped. `fleet_policy.py` decides who has to go; this file does
it. Knows nothing of HTTP requests.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loradock_adapters.registry import Version
from loradock_serve import fleet_policy
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine import AttachedEngine, Engine, EngineStart
from loradock_serve.engine_client import EngineClient
from loradock_serve.engine_command import BASE_NAME
from loradock_serve.errors import ConflictError, EngineUnavailableError
from loradock_serve.loader import AdapterLoader

log = logging.getLogger("loradock.fleet")

REAP_EVERY_S = 1.0


@dataclass(frozen=True)
class Target:
    """Where a request goes."""

    client: EngineClient
    engine_model: str
    """What the engine calls the model: a digest, or `base`."""
    engine: Engine | AttachedEngine
    start_number: int


class Weights(Protocol):
    """Where the bytes of versions are, as directories that engines can read."""

    def adapter_dir(self, version: Version) -> Path:
        """The directory of an adapter."""

    async def full_weights_dir(self, version: Version) -> Path:
        """The directory of full weights: the upload itself, or the base with the adapter merged into it."""


@dataclass
class _Dedicated:
    engine: Engine
    in_use: int = 0
    last_used_s: float = field(default_factory=time.monotonic)


class Fleet:
    """See the top of the file. One owner of all engines; everything runs on one event loop."""

    def __init__(
        self,
        base: Engine | AttachedEngine,
        make_dedicated: Callable[[str, str, Path], Engine],
        weights: Weights,
        engine_config: EngineConfig,
        dedicated_config: DedicatedConfig,
    ) -> None:
        self.base = base
        self.loader = AdapterLoader()
        self._make_dedicated = make_dedicated
        self._weights = weights
        self._engine_config = engine_config
        self._config = dedicated_config
        self._dedicated: dict[str, _Dedicated] = {}
        self._changed = asyncio.Condition()
        self._reaper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the base's engine, and looking after idle ones."""
        self.base.start()
        self._reaper = asyncio.create_task(self._reap(), name="idle engines")

    async def stop(self) -> None:
        """Stop every engine, side by side."""
        if self._reaper is not None:
            self._reaper.cancel()
        await asyncio.gather(self.base.stop(), *(entry.engine.stop() for entry in self._dedicated.values()))

    def dedicated_state(self, digest: str) -> str:
        """The state of a version's own engine, as `/v1/models` shows it."""
        entry = self._dedicated.get(digest)
        return entry.engine.state if entry is not None else "stopped"

    @contextlib.asynccontextmanager
    async def lease(self, version: Version | None, timeout_s: float | None = None) -> AsyncIterator[Target]:
        """The engine for a version (None: the base itself), ready, with the adapter loaded; kept until the block ends.

        Held up to `timeout_s`, by default what the config says for the placement. Raises EngineUnavailableError,
        EngineStartError, EngineRefusedError or ConflictError.
        """
        if version is not None and version.placement == "dedicated":
            async with self._lease_dedicated(version, timeout_s) as target:
                yield target
            return
        start = await self.base.ensure_ready(self._engine_config.hold_s if timeout_s is None else timeout_s)
        if version is not None:
            self.refuse_without_plugin(start)
            await self.loader.ensure_loaded(start, version.digest, self._weights.adapter_dir(version))
        yield Target(start.client, BASE_NAME if version is None else version.digest, self.base, start.number)

    def refuse_without_plugin(self, start: EngineStart) -> None:
        """ConflictError where an attached engine would answer with wrong weights, or cannot load adapters."""
        if start.status is None or not start.status.corrected:
            raise ConflictError(
                "The attached engine runs without Loradock's plug-in, or without --enable-lora, so it serves "
                "the base only: install loradock in its environment and start it with "
                "VLLM_PLUGINS=loradock,loradock_endpoints"
            )

    @contextlib.asynccontextmanager
    async def _lease_dedicated(self, version: Version, timeout_s: float | None) -> AsyncIterator[Target]:
        if self._config.max_engines == 0:
            raise ConflictError(
                f"{version.name!r} needs an engine of its own, and `dedicated.max_engines` is 0 on this server"
            )
        deadline = time.monotonic() + (self._config.start_timeout_s if timeout_s is None else timeout_s)
        directory = await self._weights.full_weights_dir(version)
        entry = await self._enter(version, directory, deadline)
        try:
            start = await entry.engine.ensure_ready(max(0.0, deadline - time.monotonic()))
            yield Target(start.client, version.digest, entry.engine, start.number)
        finally:
            entry.in_use -= 1
            entry.last_used_s = time.monotonic()
            async with self._changed:
                self._changed.notify_all()

    async def _enter(self, version: Version, directory: Path, deadline: float) -> _Dedicated:
        """The version's entry, made if need be, already counted as in use."""
        if (running := self._dedicated.get(version.digest)) is not None:
            running.in_use += 1  # no await since the look: nothing can have stopped it
            return running
        async with self._changed:
            while True:
                entry = self._dedicated.get(version.digest)
                if entry is not None:
                    break
                room, victim = fleet_policy.make_room(self._views(), self._config.max_engines)
                if room and victim is not None:
                    await self._stop_one(victim)
                elif room:
                    engine = self._make_dedicated(version.digest, version.name, directory)
                    entry = self._dedicated[version.digest] = _Dedicated(engine)
                    break
                else:
                    await self._wait_for_room(version, deadline)
            entry.in_use += 1
            return entry

    async def _wait_for_room(self, version: Version, deadline: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            raise EngineUnavailableError(
                f"{version.name!r} needs an engine of its own, and all {self._config.max_engines} stay in use by "
                "other models (`dedicated.max_engines`)",
                retry_after_s=10,
            ) from None

    async def _stop_one(self, digest: str) -> None:
        """Stop an idle engine; nobody can lease it meanwhile, because its entry is gone first."""
        entry = self._dedicated.pop(digest)
        log.info("stopping the engine of %s", entry.engine.plan.label)
        await entry.engine.stop()

    async def forget(self, digest: str) -> None:
        """A version is gone: free what its engine holds. Requests that still run on a dedicated engine finish first."""
        current = self.base.current
        if current is not None:
            await self.loader.unload(current, digest)
        async with self._changed:
            entry = self._dedicated.get(digest)
            if entry is not None and not entry.in_use:
                await self._stop_one(digest)

    def _views(self) -> list[fleet_policy.EngineView]:
        return [
            fleet_policy.EngineView(digest, entry.in_use, entry.last_used_s)
            for digest, entry in self._dedicated.items()
        ]

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            async with self._changed:
                for digest in fleet_policy.idle_too_long(self._views(), time.monotonic(), self._config.idle_timeout_s):
                    await self._stop_one(digest)
                    self._changed.notify_all()
