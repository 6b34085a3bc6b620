"""All engines of this gateway: the base's, and a few dedicated ones that come and go with their traffic.

`async with fleet.lease(version, …) as target` is the only way to an engine: it starts what does not run, loads what
is not loaded, and keeps what is in use from being stopped. `fleet_policy.py` decides who has to go; this file does
it. Knows nothing of HTTP requests.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loradock_adapters.registry import Version
from loradock_serve import fleet_policy
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine import AttachedEngine, Engine, EngineStart
from loradock_serve.engine_command import BASE_NAME
from loradock_serve.errors import (
    ConflictError,
    EngineError,
    EngineRefusedError,
    EngineUnavailableError,
    ProofFailedError,
)
from loradock_serve.leases import NOTHING, Counted, SharedLease, Target
from loradock_serve.ledger import Ledger
from loradock_serve.loader import AdapterLoader, Packs

log = logging.getLogger("loradock.fleet")

REAP_EVERY_S = 1.0


async def _nothing(_version: Version, _target: Target) -> None:
    """Nobody wants to know."""


class Weights(Protocol):
    """Where the bytes of versions are, as directories that engines can read."""

    async def adapter_dir(self, version: Version) -> Path:
        """The directory of an adapter, fetched first where it is not on this machine."""

    async def full_weights_dir(self, version: Version) -> Path:
        """The directory of full weights: the upload itself, or the base with the adapter merged into it."""


@dataclass
class _Dedicated:
    engine: Engine
    in_use: int = 0
    last_used_s: float = field(default_factory=time.monotonic)
    forgotten: bool = False
    """Its version is gone: it leaves with its last request."""
    leaving: asyncio.Task[None] | None = None
    """Set once it is being stopped; it is nobody's from then on, and keeps its room until it has ended."""


class Fleet:
    """See the top of the file. One owner of all engines.

    Everything runs on one event loop, and no decision awaits between what it looks at and what it does: so there is
    no lock. Whoever has to wait waits for `_changed`, and looks again.
    """

    def __init__(
        self,
        base: Engine | AttachedEngine,
        make_dedicated: Callable[[str, str, Path], Engine],
        weights: Weights,
        engine_config: EngineConfig,
        dedicated_config: DedicatedConfig,
        packs: Packs | None = None,
    ) -> None:
        self.base = base
        self.ledger = Ledger()
        self.loader = AdapterLoader(packs, self.ledger.loaded)
        self._make_dedicated = make_dedicated
        self._weights = weights
        self._engine_config = engine_config
        self._config = dedicated_config
        self._dedicated: dict[str, _Dedicated] = {}
        self._changed = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._shared_in_use: Counter[str] = Counter()
        self._answering: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._unloads: set[asyncio.Task[None]] = set()
        self.on_use: Callable[[Version, Target], Awaitable[None]] = _nothing
        """Called with a version and the engine that has it, before any request goes there; what it raises, its request
        is answered."""

    def start(self) -> None:
        """Start the base's engine, and looking after idle ones."""
        self.base.start()
        self._reaper = asyncio.create_task(self._reap(), name="idle engines")

    async def stop(self) -> None:
        """Stop every engine, side by side."""
        if self._reaper is not None:
            self._reaper.cancel()
        leaving = [self._send_away(digest) for digest in list(self._dedicated)]
        await asyncio.gather(self.base.stop(), *leaving, *self._unloads)

    def dedicated_state(self, digest: str) -> str:
        """The state of a version's own engine, as `/v1/models` shows it."""
        entry = self._dedicated.get(digest)
        return entry.engine.state if entry is not None else "stopped"

    def answering(self, version: Version | None) -> AbstractContextManager[None]:
        """A request has found its version, and needs its files until it is answered, between its leases too."""
        return NOTHING if version is None else Counted(self._answering, version.digest)

    def use_of(self, digest: str) -> str | None:
        """What needs the files of a version at this moment, in words; None where nothing does."""
        if self._answering[digest] or self._shared_in_use[digest]:
            return "requests are answered with it"
        entry = self._dedicated.get(digest)
        if entry is not None:
            return f"its own engine is {entry.engine.state}"
        return "its adapter is on its way into the engine, or out of it" if self.loader.is_moving(digest) else None

    async def engine_names(self) -> Collection[str] | None:
        """The digests of adapters that the base's engine may read from the disk; None where it does not say.

        Empty where no engine runs. What it names otherwise it still has in memory for requests, without a name.
        """
        start = self.base.current
        if start is None or start.status is None:
            return ()
        try:
            status = await start.client.status()
        except EngineError as error:
            log.info("what the engine has loaded is not known: %s", error)
            return None
        if status is None:
            return None
        parts = ("registered", "active", "loaded", "staged")
        return {name for part in parts for name in status.limits.get(part, ()) if name is not None}

    async def let_go(self, digest: str) -> None:
        """Have the base's engine forget an adapter that nothing uses and no name needs."""
        start = self.base.current
        if start is not None:
            await self.loader.unload(start, digest)
            with contextlib.suppress(EngineError):  # it does not know it: so much the better
                await start.client.unload_adapter(digest)

    def lease(self, version: Version | None, timeout_s: float | None = None) -> AbstractAsyncContextManager[Target]:
        """The engine for a version (None: the base itself), ready, with the adapter loaded; kept until the block ends.

        Held up to `timeout_s`, by default what the config says for the placement. Raises EngineUnavailableError,
        EngineStartError, EngineRefusedError or ConflictError.
        """
        if version is not None and version.placement == "dedicated":
            return self._lease_dedicated(version, timeout_s)
        return SharedLease(self, version, self._engine_config.hold_s if timeout_s is None else timeout_s)

    async def enter_shared(self, version: Version | None, hold_s: float) -> Target:
        """A lease of the base's engine begins."""
        if version is None:
            start = await self.base.ensure_ready(hold_s)
            return Target(start.client, BASE_NAME, self.base, start.number)
        digest = version.digest
        self._shared_in_use[digest] += 1
        self._forgotten.discard(digest)
        hit = self.loader.is_loaded(digest)
        self.ledger.requested(digest, version.name, len(self._shared_in_use), hit=hit)
        try:
            start = await self._with_adapter(version, hold_s)
            target = Target(start.client, digest, self.base, start.number)
            await self.on_use(version, target)
        except BaseException:
            self.leave_shared(version)
            raise
        return target

    def leave_shared(self, version: Version | None) -> None:
        """A lease of the base's engine ends."""
        if version is None:
            return
        digest = version.digest
        self._shared_in_use[digest] -= 1
        if not self._shared_in_use[digest]:
            del self._shared_in_use[digest]
            if digest in self._forgotten:
                self._unload(digest)

    async def keep_loaded(self, version: Version, hold_s: float) -> EngineStart:
        """The base's start, with a shared adapter loaded, for whoever wants it there without a request."""
        return await self._with_adapter(version, hold_s)

    async def _with_adapter(self, version: Version, hold_s: float) -> EngineStart:
        """The base's start, with the adapter loaded; an engine that goes away meanwhile is waited for again."""
        deadline = time.monotonic() + hold_s
        while True:
            start = await self.base.ensure_ready(max(0.0, deadline - time.monotonic()))
            self.refuse_without_plugin(start)
            try:
                await self.load(start, version.digest, await self._weights.adapter_dir(version))
            except EngineUnavailableError:
                if time.monotonic() >= deadline or await start.client.is_healthy() is not False:
                    raise
                self.base.suspect()
            else:
                return start

    async def load(self, start: EngineStart, digest: str, directory: Path) -> None:
        """Have the base's engine load an adapter, once. EngineRefusedError, or ConflictError by an attached engine.

        What we start reads our store; an engine that something else runs may not see the same files.
        """
        try:
            await self.loader.ensure_loaded(start, digest, directory)
        except EngineRefusedError as error:
            if isinstance(self.base, AttachedEngine):
                raise ConflictError(
                    f"The attached engine serves the base only, as far as this adapter goes: {error}. Does it see this "
                    "gateway's data_dir under the same path?"
                ) from error
            raise

    def lost(self, target: Target) -> None:
        """The base's engine does not know the adapter that a request was to run on: look who it is, load it again."""
        current = self.base.current
        if current is not None and target.engine is self.base and target.start_number == current.number:
            self.loader.lost(current, target.engine_model)
            self.base.suspect()

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
        timeout_s = self._config.start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        directory = await self._full_weights(version, timeout_s)
        entry = await self._enter(version, directory, deadline)
        try:
            start = await entry.engine.ensure_ready(max(0.0, deadline - time.monotonic()))
            target = Target(start.client, version.digest, entry.engine, start.number)
            try:
                await self.on_use(version, target)
            except ProofFailedError:
                entry.forgotten = True  # nobody will use it: it leaves with the last of those that wait for it
                raise
            yield target
        finally:
            entry.in_use -= 1
            entry.last_used_s = time.monotonic()
            if entry.forgotten and not entry.in_use:
                self._send_away(version.digest)
            self._tell_waiters()

    async def _full_weights(self, version: Version, timeout_s: float) -> Path:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._weights.full_weights_dir(version)
        except TimeoutError:
            raise EngineUnavailableError(
                f"{version.name!r} is still being merged into the base after {timeout_s:.0f} s", retry_after_s=10
            ) from None

    async def _enter(self, version: Version, directory: Path, deadline: float) -> _Dedicated:
        """The version's entry, made if need be, already counted as in use."""
        while True:
            entry = self._dedicated.get(version.digest)
            if entry is None:
                room, victim = fleet_policy.make_room(self._views(), self._config.max_engines)
                if room and victim is None:
                    engine = self._make_dedicated(version.digest, version.name, directory)
                    entry = self._dedicated[version.digest] = _Dedicated(engine)
                elif victim is not None:
                    self._send_away(victim)
            if entry is not None and entry.leaving is None:
                entry.in_use += 1
                entry.forgotten = False
                return entry
            await self._wait_for_room(version, deadline)

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

    def _tell_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # who comes from now on waits for the next change

    def _send_away(self, digest: str) -> asyncio.Task[None]:
        """Begin to stop an engine; nobody can lease it any more."""
        entry = self._dedicated[digest]
        if entry.leaving is None:
            log.info("stopping %s", entry.engine.plan.label)
            entry.leaving = asyncio.create_task(self._leave(digest, entry.engine))
        return entry.leaving

    async def _leave(self, digest: str, engine: Engine) -> None:
        await engine.stop()
        del self._dedicated[digest]
        self._tell_waiters()

    async def forget(self, digest: str) -> None:
        """A version is gone: free what engines hold of it, as soon as the requests that still run on it are done."""
        if self._shared_in_use[digest]:
            self._forgotten.add(digest)
        else:
            self._unload(digest)
        entry = self._dedicated.get(digest)
        if entry is not None:
            entry.forgotten = True
            if not entry.in_use:
                await self._send_away(digest)

    def used_digests(self) -> set[str]:
        """Versions that requests use now, or that have an engine of their own."""
        return {*self._shared_in_use, *self._dedicated}

    async def unload_idle(self, digest: str) -> None:
        """Have the base's engine forget an adapter that nobody uses, before its files go."""
        current = self.base.current
        if current is None:
            return
        await self.loader.unload(current, digest)
        with contextlib.suppress(EngineError):  # it may know it from another gateway
            await current.client.unload_adapter(digest)

    def _unload(self, digest: str) -> None:
        self._forgotten.discard(digest)
        task = asyncio.create_task(self._let_go(digest))
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def _let_go(self, digest: str) -> None:
        if self.base.current is not None:
            await self.loader.unload(self.base.current, digest)
        await self.loader.discard(digest)

    def _views(self) -> list[fleet_policy.EngineView]:
        return [
            fleet_policy.EngineView(
                digest,
                entry.in_use,
                entry.last_used_s,
                runs=entry.engine.runs,
                leaving=entry.leaving is not None,
            )
            for digest, entry in self._dedicated.items()
        ]

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            for digest in fleet_policy.idle_too_long(self._views(), time.monotonic(), self._config.idle_timeout_s):
                self._send_away(digest)
