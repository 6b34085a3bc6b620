"""Pins: kept in the registry, following their names, held in slots by whichever engine runs; and over HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry
from loradock_serve import pins as pins_module
from loradock_serve.catalog import Catalog
from loradock_serve.errors import ConflictError, EngineRefusedError, EngineUnavailableError, PinLimitError
from loradock_serve.pins import Pins
from loradock_serve.rewrite import Behaviour
from loradock_testing.gateway import Served, serving
from loradock_testing.recorded_fleet import World
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

SHARED, DEDICATED = Verdict("lora", "shared", (), 8), Verdict("full", "dedicated", (), None)


class Keeper:
    """Keeps slots when a test says that enough has drained."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.drained = asyncio.Event()
        self.drained.set()

    async def pin(self, adapter: str) -> None:
        self.calls.append(f"keep {adapter[:8]}")
        await self.drained.wait()

    def unpin(self, adapter: str) -> None:
        self.calls.append(f"give back {adapter[:8]}")


class Scene:
    """Pins on a recorded engine with `slots` slots."""

    def __init__(self, registry: Registry, slots: int | None = 3) -> None:
        self.registry = registry
        self.world = World()
        self.slots = slots
        self.catalog = Catalog(registry, "base-name", Behaviour())
        self.calls = self.world.base.client.calls
        self.keeper = Keeper(self.calls)
        self.pins = Pins(registry, self.catalog, self.world.fleet, lambda: self.slots, self.keeper)

    def publish(self, name: str, seed: int, verdict: Verdict = SHARED) -> str:
        """The first letters of its digest, as calls are recorded."""
        file = FileEntry("adapter_config.json", seed, f"{seed:064x}")
        digest = self.registry.publish(name, Manifest((file,)), verdict).digest
        self.catalog.changed()
        return digest[:8]

    async def until_called(self, *calls: str) -> None:
        await until(lambda: self.calls == list(calls), f"{calls}")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path}/registry.db")


@contextlib.asynccontextmanager
async def running(registry: Registry, slots: int | None = 3) -> AsyncIterator[Scene]:
    scene = Scene(registry, slots)
    scene.pins.start()
    try:
        yield scene
    finally:
        await scene.pins.stop()


@pytest.fixture
async def scene(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(pins_module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(pins_module, "TRY_AGAIN_S", 0.01)
    async with running(registry) as scene:
        yield scene
    registry.close()


async def test_pin_loads_then_keeps_a_slot_then_has_the_engine_pin(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    scene.keeper.drained.clear()
    version = await scene.pins.pin("a", 0.01)
    await scene.until_called(f"load {digest}", f"keep {digest}")
    state, why = scene.pins.state_of("a")
    assert (version.name, state) == ("a", "waiting")
    assert why is not None
    assert "requests in flight use all slots" in why
    scene.keeper.drained.set()
    await scene.until_called(f"load {digest}", f"keep {digest}", f"pin {digest}")
    await scene.pins.pin("a", 60)
    assert scene.pins.state_of("a") == ("held", None)
    assert len(scene.calls) == 3, "pinning it twice is pinning it once"


async def test_unpin_gives_the_slot_back_and_says_whether_there_was_a_pin(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    await scene.pins.pin("a", 60)
    scene.calls.clear()
    assert await scene.pins.unpin("a") is True
    await scene.until_called(f"give back {digest}", f"unpin {digest}")
    assert await scene.pins.unpin("a") is False
    assert scene.pins.state_of("a") == (None, None)


async def test_unpin_of_what_still_waits_for_its_slot_gives_that_back(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    scene.keeper.drained.clear()
    await scene.pins.pin("a", 0.01)
    await scene.pins.unpin("a")
    scene.keeper.drained.set()
    await scene.until_called(f"load {digest}", f"keep {digest}", f"give back {digest}")


@pytest.mark.parametrize("again", [False, True], ids=["unpinned", "and pinned again"])
async def test_pin_that_is_let_go_while_the_engine_is_asked_for_it_does_not_stay_there(
    scene: Scene, again: bool
) -> None:
    digest = scene.publish("a", 1)
    await scene.pins.pin("a", 60)
    await scene.pins.unpin("a")
    await scene.until_called(*(f"{call} {digest}" for call in ("load", "keep", "pin", "give back", "unpin")))
    scene.calls.clear()
    scene.world.base.client.may_go_on.clear()
    await scene.pins.pin("a", 0.01)
    asked = (f"keep {digest}", f"pin {digest}")
    await scene.until_called(*asked)
    await scene.pins.unpin("a")
    if again:
        await scene.pins.pin("a", 0.01)
    scene.world.base.client.may_go_on.set()
    pinned_again = (f"keep {digest}", f"unpin {digest}", f"pin {digest}") if again else (f"unpin {digest}",)
    await scene.until_called(*asked, f"give back {digest}", *pinned_again)


async def test_pin_follows_its_name_to_the_next_version_and_back(scene: Scene) -> None:
    first = scene.publish("a", 1)
    await scene.pins.pin("a", 60)
    scene.calls.clear()
    second = scene.publish("a", 2)
    new = [f"load {second}", f"keep {second}", f"pin {second}"]
    await until(lambda: set(new) <= set(scene.calls), "the new version's pin")
    assert scene.calls.index(f"give back {first}") < scene.calls.index(f"keep {second}")
    assert f"unpin {first}" in scene.calls
    scene.registry.set_current("a", 1)
    scene.catalog.changed()
    await until(lambda: f"pin {first}" in scene.calls, "the old version's pin")


async def test_change_of_another_gateway_is_noticed(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    scene.registry.pin("a")
    await until(lambda: f"pin {digest}" in scene.calls, "the pin")
    scene.registry.delete("a")
    await until(lambda: f"unpin {digest}" in scene.calls, "its end")


async def test_pins_are_held_by_the_next_start_of_the_engine(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    await scene.pins.pin("a", 60)
    scene.calls.clear()
    scene.world.base.client.healthy = False
    scene.world.base.suspect()
    scene.world.base.client.calls = scene.calls
    await scene.until_called(f"load {digest}", f"keep {digest}", f"pin {digest}")
    await until(lambda: scene.pins.state_of("a")[0] == "held", "the pin")


async def test_pins_survive_the_gateway(registry: Registry) -> None:
    async with running(registry) as before:
        before.publish("a", 1)
        await before.pins.pin("a", 60)
    async with running(registry) as after:
        await until(lambda: after.pins.state_of("a")[0] == "held", "the pin")
    registry.close()


async def test_engine_that_goes_away_while_it_pins_is_asked_again(scene: Scene) -> None:
    scene.publish("a", 1)
    scene.world.base.client.fails = [EngineUnavailableError("went away"), EngineUnavailableError("again")]
    await scene.pins.pin("a", 60)
    assert scene.pins.state_of("a") == ("held", None)


async def test_engine_that_refuses_is_not_asked_again_and_the_reason_is_told(scene: Scene) -> None:
    digest = scene.publish("a", 1)
    scene.world.base.client.fails = [EngineRefusedError("no room")]
    await scene.pins.pin("a", 60)  # does not wait for what will not come
    assert scene.pins.state_of("a") == ("waiting", "no room")
    assert scene.calls[-1] == f"give back {digest}", "others may use the slot"
    calls = len(scene.calls)
    await scene.pins.pin("a", 60)
    assert scene.pins.state_of("a") == ("held", None), "but by whoever pins again"
    assert len(scene.calls) > calls


async def test_last_slot_is_nobodys(scene: Scene) -> None:
    for number, name in enumerate("abc"):
        scene.publish(name, number)
    await scene.pins.pin("a", 60)
    await scene.pins.pin("b", 60)
    with pytest.raises(PinLimitError) as caught:
        await scene.pins.pin("c", 60)
    assert str(caught.value).startswith(
        "2 of this server's 3 slots are pinned (a, b), and 2 may be: one must stay free"
    )
    await scene.pins.pin("b", 60)
    await scene.pins.unpin("a")
    await scene.pins.pin("c", 60)


async def test_pins_over_what_a_smaller_server_can_hold_wait_in_the_order_of_their_making(scene: Scene) -> None:
    for number, name in enumerate("ab"):
        scene.publish(name, number)
        await scene.pins.pin(name, 60)
    scene.slots = 2
    scene.catalog.changed()
    await until(lambda: scene.pins.state_of("b")[0] == "waiting", "the later pin's end")
    assert scene.pins.state_of("b") == ("waiting", "there are more pins than slots to keep")
    assert scene.pins.state_of("a") == ("held", None)


async def test_engine_of_unknown_slots_cannot_pin(scene: Scene) -> None:
    scene.publish("a", 1)
    scene.slots = None
    with pytest.raises(ConflictError, match="How many slots the attached engine has is not known"):
        await scene.pins.pin("a", 60)


async def test_attached_engine_whose_slots_become_known_holds_what_is_pinned(scene: Scene) -> None:
    scene.slots = None
    digest = scene.publish("a", 1)
    scene.registry.pin("a")
    await until(lambda: scene.pins.state_of("a")[0] == "waiting", "the pin")
    assert scene.calls == [], "who knows whether there is a slot to keep"
    scene.slots = 3
    await until(lambda: scene.pins.state_of("a")[0] == "held", "the slot")
    assert scene.calls == [f"load {digest}", f"keep {digest}", f"pin {digest}"]


async def test_pinned_name_whose_next_version_has_its_own_engine_waits_and_says_so(scene: Scene) -> None:
    scene.publish("a", 1)
    await scene.pins.pin("a", 60)
    scene.publish("a", 2, DEDICATED)
    await until(lambda: scene.pins.state_of("a")[0] == "waiting", "the pin's end")
    assert scene.pins.state_of("a") == ("waiting", "version 2 has an engine of its own")


# Over HTTP


@pytest.fixture
async def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A gateway with three slots and five adapters, one of them with an engine of its own."""
    async with serving(tmp_path, monkeypatch, engine={"max_loras": 3}) as served:
        await served.until_ready()
        for number, name in enumerate(("sql", "chat", "code", "late")):
            (await served.push(write_adapter(tmp_path / name, seed=number), name)).raise_for_status()
        (await served.push(write_adapter(tmp_path / "big", rank=100), "big")).raise_for_status()
        yield served


def message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


async def test_pin_over_http_is_in_its_slot_when_it_answers_and_stays_there(few: Served) -> None:
    answer = await few.client.post("/v1/adapters/sql/pin")
    assert answer.status_code == 200
    assert (answer.json()["name"], answer.json()["current_version"], answer.json()["pinned"]) == ("sql", 1, True)
    for name in ("chat", "code", "chat", "code"):
        await few.text(name, "x")
    assert (await few.client.post("/v1/adapters/sql/pin")).status_code == 200
    shown = (await few.client.get("/v1/adapters/sql")).json()
    assert shown["residency"]["pin"] == {"state": "held", "waits_for": None}
    rows = {row["name"]: row["pinned"] for row in (await few.client.get("/v1/adapters")).json()["data"]}
    assert rows == {"sql": True, "chat": False, "code": False, "late": False, "big": False}
    assert (await few.seen())["pinned"] == [shown["digest"]]
    freed = [(await few.client.delete("/v1/adapters/sql/pin")).json()["was_pinned"] for _ in range(2)]
    assert freed == [True, False]


async def test_pin_that_cannot_be_says_why(few: Served) -> None:
    dedicated = await few.client.post("/v1/adapters/big/pin")
    assert (dedicated.status_code, dedicated.json()["error"]["code"]) == (409, "conflict")
    assert message(dedicated) == "'big' has an engine of its own: only adapters that share the base's have slots"
    unknown = await few.client.post("/v1/adapters/sqll/pin")
    assert unknown.status_code == 404
    assert message(unknown) == "The model 'sqll' does not exist. Near names: sql."
    assert (await few.client.delete("/v1/adapters/sqll/pin")).status_code == 404
    for name in ("sql", "chat"):
        assert (await few.client.post(f"/v1/adapters/{name}/pin")).status_code == 200
    full = await few.client.post("/v1/adapters/code/pin")
    assert (full.status_code, full.json()["error"]["code"]) == (409, "pin_limit")
    assert message(full).startswith("2 of this server's 3 slots are pinned (sql, chat), and 2 may be")
    base = await few.client.post("/v1/adapters/tiny-base/pin")
    assert (base.status_code, "is the base of this server" in message(base)) == (409, True)


async def test_others_share_what_a_pin_leaves_and_the_pinned_one_waits_for_nobody(few: Served) -> None:
    await few.client.post("/v1/adapters/sql/pin")
    await few.client.post("/v1/adapters/chat/pin")
    running = asyncio.create_task(few.complete("code", "a !hang", stream=True))

    async def runs() -> bool:
        return any(request["body"]["prompt"] == "a !hang" for request in (await few.seen())["requests"])

    await until(runs, "the request in the only slot left")
    waiting = asyncio.create_task(few.complete("late", "x"))
    for _ in range(3):
        assert (await few.complete("sql", "quick")).status_code == 200
    assert "x" not in [request["body"]["prompt"] for request in (await few.seen())["requests"]]
    running.cancel()
    assert (await waiting).status_code == 200


async def test_pin_waits_until_requests_leave_it_a_slot(few: Served) -> None:
    running = [asyncio.create_task(few.complete(name, "a !hang", stream=True)) for name in ("chat", "code", "late")]

    async def run() -> bool:
        return len((await few.seen())["requests"]) == 3

    await until(run, "requests in all slots")
    pin = asyncio.create_task(few.client.post("/v1/adapters/sql/pin"))
    await until(lambda: few.gateway.pins.state_of("sql")[0] == "waiting", "the pin")
    assert (await few.seen())["pinned"] == []
    running[0].cancel()
    assert (await pin).status_code == 200
    for task in running[1:]:
        task.cancel()


async def test_pin_moves_with_a_push_and_ends_with_the_name(few: Served, tmp_path: Path) -> None:
    first = (await few.client.post("/v1/adapters/sql/pin")).json()["digest"]
    assert (await few.seen())["pinned"] == [first]
    second = (await few.push(write_adapter(tmp_path / "second", seed=9), "sql")).json()["digest"]

    async def is_moved() -> bool:
        return bool((await few.seen())["pinned"] == [second])

    assert second != first
    await until(is_moved, "the pin on version 2")
    await few.client.delete("/v1/adapters/sql")

    async def is_gone() -> bool:
        return bool((await few.seen())["pinned"] == [])

    await until(is_gone, "the pin's end")
