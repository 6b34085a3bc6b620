"""Dedicated engines: who is started, who waits, who has to go, and that nothing leaks."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from loradock_serve import fleet as fleet_module
from loradock_serve.errors import ConflictError, EngineStartError, EngineUnavailableError
from loradock_testing.recorded_fleet import A, B, C, World, settle
from loradock_testing.waiting import until


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
    await asyncio.wait_for(held.let_go(), 15)
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
    await asyncio.wait_for(world.use(C), 15)  # which needs the only room
    assert all(not entry.in_use for entry in world.fleet._dedicated.values())


async def test_waiter_is_woken_when_a_cancelled_request_frees_the_room() -> None:
    world = World()
    held = world.hold(A)
    await held.begun.wait()
    waiting = asyncio.create_task(world.use(B))
    await settle()
    held.task.cancel()
    await asyncio.wait_for(waiting, 15)


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
