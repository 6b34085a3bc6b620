"""The fleet on engines that are only recorded: who is started, who waits, who has to go, and that nothing leaks."""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.registry import Version
from loradock_serve import fleet as fleet_module
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine import Engine, EnginePlan, EngineStart
from loradock_serve.engine_client import EngineClient, EngineStatus
from loradock_serve.errors import ConflictError, EngineRefusedError, EngineStartError, EngineUnavailableError
from loradock_serve.fleet import Fleet, Target
from loradock_testing.engines import fake_command
from loradock_testing.waiting import until

STATUS = EngineStatus("cpu", "x", True, (), {})


class RecordedClient(EngineClient):
    """An engine's HTTP without HTTP."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: list[Exception] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.healthy = True

    async def load_adapter(self, name: str, path: str) -> None:
        self.calls.append(f"load {name[:8]}")
        await self.may_go_on.wait()
        if self.fails:
            raise self.fails.pop(0)

    async def unload_adapter(self, name: str) -> None:
        self.calls.append(f"unload {name[:8]}")
        await self.may_go_on.wait()

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

    def adapter_dir(self, version: Version) -> Path:
        return Path("/adapters", version.name)

    async def full_weights_dir(self, version: Version) -> Path:
        await self.may_merge.wait()
        return Path("/full", version.name)


class World:
    """A fleet and everything that it touches."""

    def __init__(self, **dedicated: Any) -> None:
        self.log: list[str] = []
        self.base = RecordedEngine("base", self.log)
        self.places = Places()
        self.engines: dict[str, RecordedEngine] = {}
        self.prepare: Callable[[RecordedEngine], None] = lambda _engine: None
        config = DedicatedConfig(**{"max_engines": 1, "start_timeout_s": 5.0} | dedicated)
        self.fleet = Fleet(self.base, self.make, self.places, EngineConfig(hold_s=5.0), config)

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


async def test_base_request_goes_to_the_base_by_its_own_name() -> None:
    world = World()
    async with world.fleet.lease(None) as target:
        assert (target.engine_model, target.engine, target.start_number) == ("base", world.base, 1)
    assert world.base.client.calls == []


async def test_adapter_is_loaded_once_however_many_ask() -> None:
    world = World()
    targets = await asyncio.gather(*(world.use(LORA) for _ in range(5)))
    assert {target.engine_model for target in targets} == {LORA.digest}
    assert world.base.client.calls == [LOAD]
    assert world.fleet.loader.is_loaded(LORA.digest)


async def test_adapter_that_the_engine_refuses_is_tried_again_by_the_next_request() -> None:
    world = World()
    world.base.client.fails = [EngineRefusedError("no")]
    with pytest.raises(EngineRefusedError, match="no"):
        await world.use(LORA)
    assert not world.fleet.loader.is_loaded(LORA.digest)
    await world.use(LORA)
    assert world.base.client.calls == [LOAD, LOAD]


async def test_load_goes_on_when_the_request_that_began_it_is_gone() -> None:
    world = World()
    world.base.client.may_go_on.clear()
    first, second = (asyncio.create_task(world.use(LORA)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    world.base.client.may_go_on.set()
    await second
    assert world.base.client.calls == [LOAD]


async def test_engine_that_dies_while_it_loads_is_waited_for_and_asked_again() -> None:
    world = World()
    old = world.base.client
    old.fails = [EngineUnavailableError("went away")]
    old.healthy = False
    assert (await world.use(LORA)).start_number == 2
    assert old.calls == [LOAD]
    assert world.base.client.calls == [LOAD]


async def test_healthy_engine_that_fails_to_load_is_no_reason_to_wait() -> None:
    world = World()
    world.base.client.fails = [EngineUnavailableError("out of memory")]
    with pytest.raises(EngineUnavailableError, match="out of memory"):
        await world.use(LORA)
    assert world.base.starts == 1


async def test_adapter_that_the_engine_lost_is_loaded_again() -> None:
    world = World()
    target = await world.use(LORA)
    world.fleet.lost(replace(target, start_number=7))  # of another start: not this one's business
    await world.use(LORA)
    assert world.base.client.calls == [LOAD]
    world.fleet.lost(target)
    await world.use(LORA)
    assert world.base.client.calls == [LOAD, LOAD]
    assert "suspect base" in world.log


@pytest.mark.parametrize("status", [None, replace(STATUS, corrected=False)])
async def test_engine_without_our_plug_in_serves_the_base_only(status: EngineStatus | None) -> None:
    world = World()
    world.base.status = status
    async with world.fleet.lease(None):
        pass
    with pytest.raises(ConflictError, match=r"runs without Loradock's plug-in.*VLLM_PLUGINS="):
        await world.use(LORA)


async def test_removed_adapter_is_unloaded_once_nobody_uses_it() -> None:
    world = World()
    held = world.hold(LORA)
    await held.begun.wait()
    await world.fleet.forget(LORA.digest)
    await settle()
    assert world.base.client.calls == [LOAD]
    await held.let_go()
    await settle()
    assert world.base.client.calls == [LOAD, UNLOAD]
    await world.fleet.forget(LORA.digest)  # what is not loaded needs no unloading
    await settle()
    assert world.base.client.calls == [LOAD, UNLOAD]


async def test_adapter_that_is_published_again_while_in_use_stays() -> None:
    world = World()
    held = world.hold(LORA)
    await held.begun.wait()
    await world.fleet.forget(LORA.digest)
    await world.use(LORA)
    await held.let_go()
    await settle()
    assert world.base.client.calls == [LOAD]


async def test_load_after_an_unload_reaches_the_engine_after_it() -> None:
    world = World()
    await world.use(LORA)
    client = world.base.client
    client.may_go_on.clear()
    await world.fleet.forget(LORA.digest)
    again = asyncio.create_task(world.use(LORA))
    await settle()
    assert client.calls == [LOAD, UNLOAD]
    client.may_go_on.set()
    await again
    assert client.calls == [LOAD, UNLOAD, LOAD]
    assert world.fleet.loader.is_loaded(LORA.digest)


async def test_dedicated_model_gets_one_engine_that_stays() -> None:
    world = World()
    targets = await asyncio.gather(*(world.use(A) for _ in range(3)))
    assert {target.engine for target in targets} == {world.engines["a"]}
    assert {target.engine_model for target in targets} == {A.digest}
    assert world.log == ["start a"]
    assert world.fleet.dedicated_state(A.digest) == "ready"
    assert world.fleet.dedicated_state(B.digest) == "stopped"


async def test_no_dedicated_engines_means_a_clear_refusal() -> None:
    with pytest.raises(ConflictError, match=r"'a' needs an engine of its own, and `dedicated.max_engines` is 0"):
        await World(max_engines=0).use(A)


async def test_least_recently_used_idle_engine_makes_room() -> None:
    world = World(max_engines=2)
    for one in (A, B, A, C):
        await world.use(one)
    assert world.log == ["start a", "start b", "stop b", "start c"]


async def test_room_is_given_only_after_the_old_engine_has_ended() -> None:
    world = World()
    await world.use(A)
    world.engines["a"].may_stop.clear()
    waiting = asyncio.create_task(world.use(B))
    again = asyncio.create_task(world.use(A))  # for the engine that is going: a new one, later
    await settle()
    assert list(world.engines) == ["a"]
    assert world.fleet.dedicated_state(A.digest) == "stopping"
    world.engines["a"].may_stop.set()
    await asyncio.gather(waiting, again)
    assert world.log == ["start a", "stop a", "start b", "stop b", "start a"]


async def test_request_that_ends_is_not_held_up_by_another_engines_stop() -> None:
    world = World(max_engines=2)
    held = world.hold(A)
    await held.begun.wait()
    await world.use(B)
    world.engines["b"].may_stop.clear()
    waiting = asyncio.create_task(world.use(C))
    await settle()
    await asyncio.wait_for(held.let_go(), 1)
    world.engines["b"].may_stop.set()
    await waiting


async def test_engine_in_use_is_waited_for() -> None:
    world = World()
    held = world.hold(A)
    await held.begun.wait()
    waiting = asyncio.create_task(world.use(B))
    await settle()
    assert world.log == ["start a"]
    await held.let_go()
    await waiting
    assert world.log == ["start a", "stop a", "start b"]


async def test_wait_for_room_ends_with_the_deadline() -> None:
    world = World()
    held = world.hold(A)
    await held.begun.wait()
    with pytest.raises(EngineUnavailableError, match="'b' needs an engine of its own, and all 1 stay in use") as caught:
        await world.use(B, timeout_s=0.01)
    assert caught.value.retry_after_s == 10
    await held.let_go()


@pytest.mark.parametrize("phase", ["room", "start", "use"])
async def test_request_cancelled_in_any_phase_frees_its_engine(phase: str) -> None:
    world = World()
    async with AsyncExitStack() as stack:
        if phase == "room":
            blocker = world.hold(A)
            await blocker.begun.wait()
            stack.push_async_callback(blocker.let_go)
        if phase == "start":
            world.prepare = lambda engine: engine.may_start.clear()
        held = world.hold(B)
        await settle()
        assert held.begun.is_set() is (phase == "use")
        held.task.cancel()
        await settle()
        assert held.task.cancelled()
    world.prepare = lambda _engine: None
    await asyncio.wait_for(world.use(C), 1)  # which needs the only room
    assert all(not entry.in_use for entry in world.fleet._dedicated.values())


async def test_waiter_is_woken_when_a_cancelled_request_frees_the_room() -> None:
    world = World()
    held = world.hold(A)
    await held.begun.wait()
    waiting = asyncio.create_task(world.use(B))
    await settle()
    held.task.cancel()
    await asyncio.wait_for(waiting, 1)


async def test_engine_that_fails_to_start_is_started_afresh_by_the_next_request() -> None:
    world = World()
    world.prepare = lambda engine: engine.fails.append(EngineStartError("no memory"))
    with pytest.raises(EngineStartError, match="no memory"):
        await world.use(A)
    assert world.fleet.dedicated_state(A.digest) == "failed"
    await world.use(A)
    assert world.log == ["start a"]


async def test_failed_engine_takes_no_room_from_a_good_one() -> None:
    world = World(max_engines=2)
    await world.use(A)
    world.prepare = lambda engine: engine.fails.append(EngineStartError("no memory"))
    with pytest.raises(EngineStartError):
        await world.use(B)
    world.prepare = lambda _engine: None
    await world.use(C)
    assert world.log == ["start a", "stop b", "start c"]
    assert world.fleet.dedicated_state(A.digest) == "ready"


async def test_start_that_takes_too_long_is_said_to_its_request_only() -> None:
    world = World()
    world.prepare = lambda engine: engine.may_start.clear()
    with pytest.raises(EngineUnavailableError, match="too slow"):
        await world.use(A, timeout_s=0.01)
    world.engines["a"].may_start.set()
    await world.use(A)


async def test_merge_that_takes_too_long_is_not_waited_for() -> None:
    world = World()
    world.places.may_merge.clear()
    with pytest.raises(EngineUnavailableError, match="'a' is still being merged into the base after 0 s"):
        await world.use(A, timeout_s=0.01)
    world.places.may_merge.set()
    await world.use(A)


async def test_removed_dedicated_model_finishes_its_requests_and_goes() -> None:
    world = World()
    held = world.hold(A)
    await held.begun.wait()
    await world.fleet.forget(A.digest)
    assert world.log == ["start a"]
    await held.let_go()
    await until(lambda: world.log == ["start a", "stop a"], "the engine's end")
    await world.use(B)
    await world.fleet.forget(B.digest)  # idle: at once
    assert world.log[-1] == "stop b"


async def test_idle_engine_is_stopped_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "REAP_EVERY_S", 0.01)
    world = World(max_engines=2, idle_timeout_s=0.05)
    world.fleet.start()
    held = world.hold(A)
    await held.begun.wait()
    await world.use(B)
    await until(lambda: "stop b" in world.log, "the idle engine's end")
    assert "stop a" not in world.log
    await held.let_go()
    await world.fleet.stop()


async def test_fleet_stops_every_engine_one_that_is_leaving_included() -> None:
    world = World(max_engines=2)
    world.fleet.start()
    await world.use(A)
    await world.use(B)
    world.engines["a"].may_stop.clear()
    leaving = asyncio.create_task(world.fleet.forget(A.digest))
    stopping = asyncio.create_task(world.fleet.stop())
    await settle()
    assert not stopping.done()
    world.engines["a"].may_stop.set()
    await asyncio.gather(stopping, leaving)
    assert sorted(line for line in world.log if line.startswith("stop")) == ["stop a", "stop b", "stop base"]
