"""Where adapters are: asked of the engine seldom, told at once, and shown to people and to Prometheus."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.registry import Registry
from loradock_serve.engine_client import EngineStatus
from loradock_serve.errors import EngineError
from loradock_serve.metrics import REGISTRY
from loradock_serve.residency import Look, Residency
from loradock_testing.gateway import Served, serving
from loradock_testing.recorded_fleet import RecordedClient, World
from loradock_testing.tiny_checkpoints import write_adapter, write_base

COUNTS = {"reads": 1, "activations": 2, "slot_evictions": 3, "cpu_evictions": 4}


class Engine(RecordedClient):
    """Says what a test wants it to say, when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.says: dict[str, Any] = {}
        self.breaks = False

    async def status(self) -> EngineStatus:
        self.asked += 1
        await self.may_go_on.wait()
        if self.breaks:
            raise EngineError("no")
        return EngineStatus("cpu", "x", True, (), self.says)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A residency on a recorded engine that is up."""

    def __init__(self) -> None:
        self.world = World()
        self.engine = Engine()
        self.world.base.client = self.engine
        self.clock = Clock()
        self.stored = {"stored"}
        self.residency = Residency(self.world.fleet, self.stored.__contains__, self.clock)

    async def up(self) -> "Scene":
        await self.world.base.ensure_ready(1)
        return self


async def scene() -> Scene:
    return await Scene().up()


async def test_engine_is_asked_once_a_second_however_many_want_to_know() -> None:
    it = await scene()
    await asyncio.gather(*(it.residency.look() for _ in range(5)))
    it.clock.now_s += 0.9
    await it.residency.look()
    assert it.engine.asked == 1
    it.clock.now_s += 0.2
    await it.residency.look()
    assert it.engine.asked == 2


async def test_busy_engine_keeps_nobody_waiting_and_the_last_answer_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradock_serve.residency.WAIT_S", 0.01)
    it = await scene()
    it.engine.says = {"active": ["a", None], "loaded": ["a", "b"]}
    await it.residency.look()
    it.engine.may_go_on.clear()
    it.clock.now_s += 30
    look = await it.residency.look()
    assert (set(look.in_slots), it.residency.age_s(look)) == ({"a"}, 30)
    await it.residency.look()
    assert it.engine.asked == 2, "the first of these still waits for its answer"


async def test_engine_that_fails_to_answer_leaves_what_was_known() -> None:
    it = await scene()
    it.engine.says = {"active": ["a"]}
    await it.residency.look()
    it.engine.breaks = True
    it.clock.now_s += 2
    assert (await it.residency.look()).in_slots == {"a"}


async def test_engine_that_is_gone_has_nothing() -> None:
    it = await scene()
    it.engine.says = {"active": ["a"]}
    await it.residency.look()
    it.engine.healthy = False
    it.world.base.suspect()
    look = await it.residency.look()
    assert (look.in_slots, look.slots) == (frozenset(), 0)


async def test_place_is_the_fastest_that_has_it() -> None:
    it = await scene()
    it.engine.says = {"active": ["slot", None], "loaded": ["slot", "cpu"], "staged": ["ahead"], "pinned": ["slot"]}
    look = await it.residency.look()
    places = {name: it.residency.place(look, name) for name in ("slot", "cpu", "ahead", "stored", "elsewhere")}
    assert places == {"slot": "slot", "cpu": "cpu", "ahead": "cpu", "stored": "disk", "elsewhere": "remote"}
    assert (look.slots, set(look.pinned)) == (2, {"slot"})


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_what_an_engine_counted_is_added_once_also_across_its_restart() -> None:
    it = await scene()
    names = {"loradock_adapter_reads_total": {}, "loradock_adapter_evictions_total": {"place": "cpu"}}
    before = [sample(name, **labels) for name, labels in names.items()]
    for says in (COUNTS, COUNTS, COUNTS | {"reads": 5}):
        it.engine.says = {"counts": says}
        it.clock.now_s += 2
        await it.residency.look()
    after = [sample(name, **labels) for name, labels in names.items()]
    assert [now - then for now, then in zip(after, before, strict=True)] == [5, 4]


def test_status_of_an_engine_without_our_plugin_is_a_look_at_nothing() -> None:
    assert Look.of(1.0, 2, {}) == Look(1.0, 2)


@pytest.fixture
async def adapters(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr("loradock_serve.residency.WAIT_S", 60.0)
    await served.until_ready()
    for number, name in enumerate(("asked", "stored")):
        (await served.push(write_adapter(tmp_path / name, seed=number), name)).raise_for_status()
    return served


async def test_adapter_shows_where_it_is_and_how_it_got_there(adapters: Served) -> None:
    await adapters.text("asked", "x")
    await adapters.text("asked", "y")
    asked = (await adapters.client.get("/v1/adapters/asked")).json()
    residency = asked["residency"]
    assert (residency["place"], residency["pin"], asked["pinned"]) == ("slot", None, False)
    assert (residency["hits"], residency["misses"], residency["loads"]) == (2, 0, 1), "the push loaded it"
    assert residency["last_load_seconds"] > 0
    assert residency["last_used_at"].endswith("+00:00")
    assert residency["activations"] == 1
    assert 0 <= residency["seen_seconds_ago"] < 60
    assert sum(residency["load_seconds"]["counts"].values()) == 1
    stored = (await adapters.client.get("/v1/adapters/stored")).json()
    assert (stored["residency"]["place"], stored["residency"]["last_used_at"]) == ("cpu", None)
    places = {row["name"]: row["residency"] for row in (await adapters.client.get("/v1/adapters")).json()["data"]}
    assert places == {"asked": "slot", "stored": "cpu"}


async def test_adapter_of_a_version_with_its_own_engine_has_no_residency(adapters: Served, tmp_path: Path) -> None:
    dora = write_adapter(tmp_path / "over", rank=100)
    (await adapters.push(dora, "over")).raise_for_status()
    shown = (await adapters.client.get("/v1/adapters/over")).json()
    assert (shown["placement"], shown["residency"]) == ("dedicated", None)


async def test_metrics_have_adapters_by_place_and_slots_by_state(adapters: Served) -> None:
    await adapters.text("asked", "x")
    lines = (await adapters.client.get("/metrics")).text.splitlines()
    for line in (
        'loradock_adapters{residency="slot"} 1.0',
        'loradock_adapters{residency="cpu"} 1.0',
        'loradock_adapters{residency="disk"} 0.0',
        'loradock_adapters{residency="remote"} 0.0',
        'loradock_adapter_slots{state="used"} 1.0',
        'loradock_adapter_slots{state="pinned"} 0.0',
        "loradock_residency_age_seconds 0.0",
    ):
        assert line in lines or line.startswith("loradock_residency_age"), line
    assert any(line.startswith('loradock_adapter_requests_total{found="loaded",model="asked"}') for line in lines)


async def test_metrics_follow_what_is_published_and_removed(adapters: Served) -> None:
    await adapters.client.get("/metrics")
    await adapters.client.delete("/v1/adapters/stored")
    lines = (await adapters.client.get("/metrics")).text.splitlines()
    assert 'loradock_adapters{residency="cpu"} 1.0' in lines


async def test_adapter_whose_bytes_are_gone_from_this_disk_is_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "fail-to-start")
    async with serving(tmp_path, monkeypatch, base=str(base)) as served:
        digest = (await served.push(write_adapter(tmp_path / "a"), "a")).json()["digest"]
        assert (await served.client.get("/v1/adapters/a")).json()["residency"]["place"] == "disk"
        served.version_dir(digest).rename(tmp_path / "elsewhere")
        shown = (await served.client.get("/v1/adapters/a")).json()["residency"]
        assert (shown["place"], shown["seen_seconds_ago"]) == ("remote", None)


async def test_requests_ask_the_engine_nothing_about_residency(adapters: Served) -> None:
    asked = (await adapters.seen())["statuses"]
    for _ in range(5):
        await adapters.text("asked", "x")
    assert (await adapters.seen())["statuses"] == asked


async def test_traffic_is_in_the_registry_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as served:
        digest = (await served.push(write_adapter(tmp_path / "a"), "a")).json()["digest"]
        await asyncio.gather(*(served.text("a", "x") for _ in range(3)))
    registry = Registry(f"sqlite:///{served.data_dir / 'registry.sqlite'}")
    recorded = registry.traffic.between(0, 10**6)
    registry.close()
    assert (recorded.requests, recorded.peak_adapters) == ({digest: 3}, 1)


async def test_plan_route_tells_the_next_start_and_what_runs(adapters: Served) -> None:
    await adapters.text("asked", "x")
    document = (await adapters.client.get("/v1/plan")).json()
    assert document["running"]["reasons"]["max_lora_rank"] == "nothing is published: room for what is usual"
    assert (
        document["plan"]["reasons"]["max_lora_rank"] == "the largest published rank is 4; room for larger ones to come"
    )
    assert document["plan"]["max_loras"] == document["running"]["max_loras"]
