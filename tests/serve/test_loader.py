"""Adapters on the base's engine: loaded once for each start, again when lost, unloaded when nobody uses them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from loradock_serve.engine_client import EngineStatus
from loradock_serve.errors import ConflictError, EngineRefusedError, EngineUnavailableError
from loradock_testing.recorded_fleet import LOAD, LORA, STATUS, UNLOAD, World, settle, version


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
    world.fleet.lost(target._replace(start_number=7))  # of another start: not this one's business
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


class RecordedPacks:
    """Packed forms that are where a test says."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.found: Path | None = Path("/packed")

    async def directory_of(self, digest: str, source: Path, form: str) -> Path | None:
        self.log.append(f"{source} as {form}")
        return self.found

    async def discard(self, digest: str) -> None:
        self.log.append(f"discard {digest[:8]}")


@pytest.mark.parametrize(("device", "form"), [("cpu", "bfloat16-cpu"), ("cuda", "bfloat16")])
async def test_engine_is_told_where_the_packed_form_for_it_lies(device: str, form: str) -> None:
    packs = RecordedPacks()
    world = World(packs)
    world.base.status = replace(STATUS, device=device, limits={"lora_dtype": "bfloat16"})
    await world.use(LORA)
    assert world.base.client.calls == [f"{LOAD} from /packed"]
    await world.fleet.forget(LORA.digest)
    await settle()
    assert packs.log == [f"/adapters/lora as {form}", f"discard {LORA.digest[:8]}"]


@pytest.mark.parametrize("limits", [{}, {"lora_dtype": None}, {"lora_dtype": "bfloat16"}])
async def test_adapter_without_a_packed_form_is_loaded_as_it_is(limits: dict[str, str | None]) -> None:
    packs = RecordedPacks()
    packs.found = None
    world = World(packs)
    world.base.status = replace(STATUS, limits=limits)
    await world.use(LORA)
    assert world.base.client.calls == [LOAD]
    assert len(packs.log) == (limits.get("lora_dtype") is not None)


async def test_load_that_takes_long_holds_up_no_other() -> None:
    world = World()
    client = world.base.client
    client.may_go_on.clear()
    slow = asyncio.create_task(world.use(LORA))
    await settle()
    other = version("other", "shared")
    quick = asyncio.create_task(world.use(other))
    await settle()
    assert client.calls == [LOAD, f"load {other.digest[:8]}"]
    client.may_go_on.set()
    await asyncio.gather(slow, quick)
