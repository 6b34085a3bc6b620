"""A fleet on engines that are only recorded: they start, load and stop when a test says that they may."""

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loradock_adapters.registry import Version
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine import Engine, EnginePlan, EngineStart
from loradock_serve.engine_client import EngineClient, EngineStatus
from loradock_serve.errors import EngineStartError, EngineUnavailableError
from loradock_serve.fleet import Fleet
from loradock_serve.leases import Target
from loradock_serve.loader import Packs
from loradock_testing.engines import fake_command

STATUS = EngineStatus("cpu", "x", True, (), {})


class RecordedClient(EngineClient):
    """An engine's HTTP without HTTP."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: list[Exception] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.healthy = True

    async def load_adapter(self, name: str, path: str, packed: str | None = None) -> None:
        self.calls.append(f"load {name[:8]}" + (f" from {packed}" if packed else ""))
        await self.may_go_on.wait()
        if self.fails:
            raise self.fails.pop(0)

    async def unload_adapter(self, name: str) -> None:
        self.calls.append(f"unload {name[:8]}")
        await self.may_go_on.wait()

    async def pin_adapter(self, name: str) -> None:
        self.calls.append(f"pin {name[:8]}")
        await self.may_go_on.wait()
        if self.fails:
            raise self.fails.pop(0)

    async def unpin_adapter(self, name: str) -> None:
        self.calls.append(f"unpin {name[:8]}")

    async def is_healthy(self) -> bool:
        return self.healthy

    async def close(self) -> None:
        pass


class RecordedEngine(Engine):
    """Starts when it is told that it may; stops when it is told that it may."""

    def __init__(self, label: str, log: list[str]) -> None:
        plan = EnginePlan(label, fake_command, Path(), Path(), 1.0, False, False)
        super().__init__(plan)
        self.log = log
        self.client = RecordedClient()
        self.status: EngineStatus | None = STATUS
        self.fails: list[EngineStartError] = []
        self.may_start, self.may_stop = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.may_stop.set()
        self._current: EngineStart | None = None

    @property
    def current(self) -> EngineStart | None:
        return self._current

    @property
    def runs(self) -> bool:
        return self.state in ("starting", "ready", "stopping")

    def start(self) -> None:
        self.log.append(f"start {self.plan.label}")

    async def ensure_ready(self, timeout_s: float) -> EngineStart:
        if self._current is None:
            self.state = "starting"
            try:
                await asyncio.wait_for(self.may_start.wait(), timeout_s)
            except TimeoutError:
                raise EngineUnavailableError("too slow") from None
            if self.fails:
                self.state = "failed"
                raise self.fails.pop(0)
        if self._current is None:
            self.starts += 1
            self.log.append(f"start {self.plan.label}")
            self._current = EngineStart(self.starts, self.client, self.status)
            self.state = "ready"
        return self._current

    def suspect(self) -> None:
        self.log.append(f"suspect {self.plan.label}")
        if not self.client.healthy:
            self.client = RecordedClient()
            self._current = None

    async def stop(self) -> None:
        self.state = "stopping"
        await self.may_stop.wait()
        self.log.append(f"stop {self.plan.label}")
        self._current, self.state = None, "stopped"


class Places:
    """Weights that are everywhere; a merge takes as long as `may_merge` says."""

    def __init__(self) -> None:
        self.may_merge = asyncio.Event()
        self.may_merge.set()

    async def adapter_dir(self, version: Version) -> Path:
        return Path("/adapters", version.name)

    async def full_weights_dir(self, version: Version) -> Path:
        await self.may_merge.wait()
        return Path("/full", version.name)


class World:
    """A fleet and everything that it touches."""

    def __init__(self, packs: Packs | None = None, **dedicated: Any) -> None:
        self.log: list[str] = []
        self.base = RecordedEngine("base", self.log)
        self.places = Places()
        self.engines: dict[str, RecordedEngine] = {}
        self.prepare: Callable[[RecordedEngine], None] = lambda _engine: None
        config = DedicatedConfig(**{"max_engines": 1, "start_timeout_s": 5.0} | dedicated)
        self.fleet = Fleet(self.base, self.make, self.places, EngineConfig(hold_s=5.0), config, packs)

    def make(self, _digest: str, name: str, _directory: Path) -> Engine:
        engine = self.engines[name] = RecordedEngine(name, self.log)
        self.prepare(engine)
        return engine

    async def use(self, one: Version, timeout_s: float | None = None) -> Target:
        """One short request."""
        async with self.fleet.lease(one, timeout_s) as target:
            return target

    def hold(self, one: Version) -> "Held":
        return Held(self, one)


class Held:
    """A request that goes on until it is let go."""

    def __init__(self, world: World, one: Version) -> None:
        self.begun = asyncio.Event()
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(world, one))

    async def _run(self, world: World, one: Version) -> None:
        async with world.fleet.lease(one):
            self.begun.set()
            await self._end.wait()

    async def let_go(self) -> None:
        self._end.set()
        await self.task


def version(name: str, placement: Any = "dedicated") -> Version:
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    kind: Any = "full" if placement == "dedicated" else "lora"
    now = datetime.now(UTC)
    return Version(name, 1, digest, kind, placement, (), None, 1, now, None, (), True)


A, B, C = version("a"), version("b"), version("c")
LORA = version("lora", "shared")
LOAD, UNLOAD = f"load {LORA.digest[:8]}", f"unload {LORA.digest[:8]}"


async def settle() -> None:
    """Let every task that can go on go on: nothing here waits for anything outside this loop."""
    for _ in range(20):
        await asyncio.sleep(0)
