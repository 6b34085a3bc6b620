"""From a model's name to its version, few models and many."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa

from loradock_adapters.errors import RegistryUnavailableError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Details, Registry, Route, Version
from loradock_serve import catalog as catalog_module
from loradock_serve.catalog import Catalog
from loradock_serve.errors import ConflictError, ModelNotFoundError
from loradock_serve.rewrite import Behaviour
from loradock_testing.waiting import until


def manifest(content: str) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", 1, hashlib.sha256(content.encode()).hexdigest()),))


def publish(registry: Registry, name: str, content: str = "", details: Details | None = None) -> None:
    registry.publish(name, manifest(content or name), Verdict("lora", "shared", (), 8), details)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'r.sqlite'}")


def test_mistake_that_is_repeated_costs_one_look_through_all_names(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        publish(registry, f"customer-{number:03}")
    catalog = Catalog(registry, "m", Behaviour())
    assert len(catalog.cards(catalog.current(), "ready", lambda _version: "stored")) == 101
    looks: list[Registry] = []
    models = Registry.models

    def counted(self: Registry) -> list[Version]:
        looks.append(self)
        return models(self)

    monkeypatch.setattr(Registry, "models", counted)
    for _ in range(200):
        with pytest.raises(ModelNotFoundError, match=r"Near names: customer-[0-9]{3}"):
            catalog.resolve("custmer-01")
    assert len(looks) == 1
    registry.close()


def test_cached_name_follows_a_change(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "MAX_CACHED", 2)
    catalog = Catalog(registry, "m", Behaviour())
    with pytest.raises(ModelNotFoundError):
        catalog.resolve("a")
    publish(registry, "a", "one")
    assert catalog.resolve("a").engine_name == manifest("one").digest
    publish(registry, "a", "two")
    assert catalog.resolve("a").engine_name == manifest("two").digest
    for ref in ("a@1", "a@2", "m"):
        catalog.resolve(ref)
    assert len(catalog._cache) <= 2
    registry.close()


def test_what_another_gateway_changes_is_seen_at_the_next_request(registry: Registry, tmp_path: Path) -> None:
    other = Registry(f"sqlite:///{tmp_path / 'r.sqlite'}")
    here, there = Catalog(registry, "m", Behaviour()), Catalog(other, "m", Behaviour())
    for publisher, content in ((other, "one"), (registry, "two"), (other, "three")):
        publish(publisher, "a", content)
        for catalog in (here, there, here):
            assert catalog.resolve("a").engine_name == manifest(content).digest
    other.delete("a")
    with pytest.raises(ModelNotFoundError):
        here.resolve("a")
    registry.close()
    other.close()


@pytest.mark.parametrize("is_told", [True, False], ids=["the registry tells", "its notice is still to come"])
async def test_lookup_from_before_a_change_is_not_remembered_by_who_joins_it_after(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    if not is_told:
        monkeypatch.setattr(Registry, "generation", lambda _registry: 7)
    publish(registry, "a", "one")
    catalog = Catalog(registry, "m", Behaviour())
    has_read, may_answer = threading.Event(), threading.Event()
    route = Registry.route

    def slowly(self: Registry, name: str) -> Route:
        found = route(self, name)
        has_read.set()
        may_answer.wait(10)
        return found

    with pytest.MonkeyPatch.context() as slow:
        slow.setattr(Registry, "route", slowly)
        early = asyncio.create_task(catalog.know("a"))
        await asyncio.to_thread(has_read.wait, 10)
        publish(registry, "a", "two")
        catalog.changed("a")
        slow.undo()
        late = asyncio.create_task(catalog.know("a"))
        await asyncio.sleep(0)
        may_answer.set()
        await asyncio.gather(early, late)
    assert catalog.resolve("a").engine_name == manifest("two").digest
    registry.close()


async def test_flood_of_unknown_names_holds_up_no_known_one(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "a")
    catalog = Catalog(registry, "m", Behaviour())
    searching, may_end = threading.Event(), threading.Event()

    def slowly(self: Registry) -> list[Version]:
        searching.set()
        may_end.wait(60)
        return []

    monkeypatch.setattr(Registry, "models", slowly)
    flood = [asyncio.create_task(catalog.know(f"unknown-{number}")) for number in range(20)]
    try:
        await asyncio.to_thread(searching.wait, 10)
        async with asyncio.timeout(30):
            await catalog.know("a")
    finally:
        may_end.set()
    errors = await asyncio.gather(*flood, return_exceptions=True)
    assert all(isinstance(error, ModelNotFoundError) for error in errors)
    registry.close()


def test_name_that_does_not_change_is_looked_up_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, "a")
    catalog = Catalog(registry, "m", Behaviour())
    first = catalog.resolve("a")
    monkeypatch.setattr(Registry, "resolve", None)
    assert catalog.resolve("a") is first
    registry.close()


def test_adapter_brings_only_what_the_base_has_not(registry: Registry) -> None:
    publish(registry, "same", details=Details("template", (2,)))
    publish(registry, "other", details=Details("own", (2, 7)))
    catalog = Catalog(registry, "m", Behaviour("template", (2,)))
    assert catalog.resolve("same").behaviour == Behaviour()
    assert catalog.resolve("other").behaviour == Behaviour("own", (7,))
    assert catalog.resolve("m").behaviour == Behaviour()
    registry.close()


def test_names_of_the_base_cannot_be_taken(registry: Registry) -> None:
    catalog = Catalog(registry, "m", Behaviour())
    catalog.check_free("n")
    for name in ("m", "base"):
        with pytest.raises(ConflictError, match=f"'{name}' is the base's own name on this server"):
            catalog.check_free(name)
    assert Catalog(registry, "base", Behaviour()).base_names == ("base",)
    registry.close()


def test_endless_name_is_not_compared_with_anything(registry: Registry) -> None:
    catalog = Catalog(registry, "m", Behaviour())
    with pytest.raises(ModelNotFoundError) as caught:
        catalog.resolve("m" * 10**7)
    assert caught.value.near == ()
    registry.close()


class AwayRegistry:
    """A registry whose database answers, fails or says nothing, as a test wants."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.number = 0
        self.error: Exception | None = None
        self.looks = 0
        self.asked: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def generation(self) -> int:
        self.looks += 1
        return self.number

    def route(self, name: str) -> Route:
        self.asked.append(name)
        assert self.may_answer.wait(10)
        if self.error is not None:
            raise self.error
        return self._registry.route(name)

    def models(self) -> list[Version]:
        return self._registry.models()


AWAY = sa.exc.OperationalError("SELECT", {}, Exception("the server is away"))


@pytest.fixture
def away(registry: Registry) -> Iterator[AwayRegistry]:
    publish(registry, "a", "one")
    yield AwayRegistry(registry)
    registry.close()


def catalog_on(away: AwayRegistry) -> Catalog:
    return Catalog(cast(Registry, away), "m", Behaviour())


async def test_name_is_asked_for_once_however_many_want_to_know_it(away: AwayRegistry) -> None:
    catalog = catalog_on(away)
    away.may_answer.clear()
    wanted = [asyncio.create_task(catalog.know("a")) for _ in range(5)]
    await until(lambda: bool(away.asked), "the question")
    away.may_answer.set()
    await asyncio.gather(*wanted)
    await catalog.know("a")
    await catalog.know("m")
    assert catalog.resolve("a").engine_name == manifest("one").digest
    assert away.asked == ["a"]
    with pytest.raises(ModelNotFoundError):
        await catalog.know("b")


async def test_name_that_is_known_costs_one_look_for_changes_a_while(
    away: AwayRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "LOOK_EVERY_S", 3600.0)
    catalog = catalog_on(away)
    first = await catalog.find("a")
    before = away.looks
    for _ in range(3):
        assert await catalog.find("a") is first
    assert away.looks == before
    monkeypatch.setattr(catalog_module, "LOOK_EVERY_S", 0.0)
    await asyncio.sleep(0.002)  # the clock has moved on
    assert await catalog.find("a") is first
    assert away.looks == before + 1
    away.number = 1
    await asyncio.sleep(0.002)
    assert (await catalog.find("a")).engine_name == manifest("one").digest
    assert away.asked == ["a", "a"]


async def test_own_change_of_a_name_is_seen_at_once(away: AwayRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "LOOK_EVERY_S", 3600.0)
    catalog = catalog_on(away)
    await catalog.find("a")
    catalog.changed()
    await catalog.find("a")
    assert away.asked == ["a", "a"]


async def test_name_that_was_seen_answers_while_the_database_is_away(
    away: AwayRegistry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 60.0)
    monkeypatch.setattr(catalog_module, "AWAY_S", 3600.0)
    catalog = catalog_on(away)
    await catalog.know("a")
    away.number, away.error = 1, AWAY  # something has changed, and nobody can say what
    for _ in range(3):
        await catalog.know("a")
        assert catalog.resolve("a").engine_name == manifest("one").digest
    assert len(away.asked) == 2, "a database that is away is not asked for each request"
    told = [message for message in caplog.messages if "does not say what 'a' is (OperationalError)" in message]
    assert len(told) == 1, "and is told of once"
    with pytest.raises(sa.exc.OperationalError):
        await catalog.know("never-seen")


@pytest.mark.parametrize("seen_first", [False, True], ids=["changed", "a look for changes first"])
async def test_what_this_server_changed_itself_never_means_again_what_it_meant(
    away: AwayRegistry, registry: Registry, monkeypatch: pytest.MonkeyPatch, seen_first: bool
) -> None:
    catalog = catalog_on(away)
    publish(registry, "other", "one")
    for model in ("a", "other"):
        await catalog.find(model)
    publish(registry, "a", "two")
    away.number = 1
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 0.02)
    monkeypatch.setattr(catalog_module, "AWAY_S", 3600.0)
    away.may_answer.clear()
    if seen_first:  # by a request that comes between the commit and the end of the push
        await catalog.know("a")
    catalog.changed("a")
    assert (await catalog.find("other")).engine_name == manifest("one").digest, "a database that says nothing"
    waiting = asyncio.create_task(catalog.find("a"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    away.may_answer.set()
    assert (await waiting).engine_name == manifest("two").digest


async def test_process_that_stood_still_is_no_database_that_is_away(
    away: AwayRegistry, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(catalog_module, "LATE_S", 60.0)
    catalog = catalog_on(away)
    await catalog.find("a")
    publish(registry, "a", "two")  # by another gateway
    away.number = 1
    waiting = asyncio.create_task(catalog.find("a"))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(time.sleep, 0.2)
    assert (await waiting).engine_name == manifest("two").digest


async def test_name_that_this_server_moves_while_it_is_asked_for_is_asked_for_as_a_new_one(
    away: AwayRegistry, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(catalog_module, "LATE_S", 0.0)
    catalog = catalog_on(away)
    await catalog.find("a")
    away.number = 1
    away.may_answer.clear()
    waiting = asyncio.create_task(catalog.find("a"))
    await until(lambda: len(away.asked) == 2, "the question")
    publish(registry, "a", "two")
    catalog.changed("a")
    await until(lambda: len(away.asked) == 3, "the question once more")
    away.may_answer.set()
    assert (await waiting).engine_name == manifest("two").digest


async def test_name_that_moved_meanwhile_is_seen_once_the_database_is_back(
    away: AwayRegistry, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "AWAY_S", 0.0)
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 60.0)
    catalog = catalog_on(away)
    await catalog.know("a")
    publish(registry, "a", "two")
    away.number = 1
    await catalog.know("a")
    assert catalog.resolve("a").engine_name == manifest("two").digest
    registry.delete("a")
    away.number = 2
    with pytest.raises(ModelNotFoundError):
        await catalog.know("a")
    away.error = AWAY
    with pytest.raises(sa.exc.OperationalError):
        await catalog.know("a")  # it is known to be gone


async def test_database_that_says_nothing_holds_nobody_for_long(
    away: AwayRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_on(away)
    await catalog.know("a")
    monkeypatch.setattr(catalog_module, "LOOKUP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(catalog_module, "KNOWN_TIMEOUT_S", 0.02)
    monkeypatch.setattr(catalog_module, "AWAY_S", 3600.0)
    away.number = 1
    away.may_answer.clear()
    await catalog.know("a")
    assert catalog.resolve("a").engine_name == manifest("one").digest
    with pytest.raises(RegistryUnavailableError, match=r"not said within 0\.05 s what 'b' is"):
        await catalog.know("b")
    away.may_answer.set()
    await until(lambda: not catalog._lookups, "the late answers")
