"""Copies of uploads within their budget: the oldest go, and nothing that an engine may read. The engine is a stand-in
here; the directories are real."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from loradock_adapters.blob_store import FsspecBlobs
from loradock_adapters.cached_store import CachedStore
from loradock_adapters.manifest import FileEntry, Manifest, manifest_of
from loradock_adapters.registry import Version
from loradock_serve.cache_keeper import CacheKeeper
from loradock_serve.data_dir import DirectoryUse
from loradock_serve.directories import CachedDirectories
from loradock_serve.errors import ConflictError
from loradock_serve.fleet import Fleet
from loradock_serve.residency import Look, Residency
from loradock_testing.recorded_fleet import LORA
from loradock_testing.waiting import until

SIZE_BYTES = 1000


class Engine:
    """What a keeper asks of the fleet and of the residency."""

    def __init__(self) -> None:
        self.look_at = Look(0.0, 1, 4)
        self.age = 0.0
        self.used: set[str] = set()
        self.forgot: list[str] = []
        self.on_unload: Callable[[str], None] = lambda _digest: None
        self.base = self
        self.current: object | None = self

    def used_digests(self) -> set[str]:
        return self.used

    async def unload_idle(self, digest: str) -> None:
        self.on_unload(digest)
        self.forgot.append(digest)
        await asyncio.sleep(0)

    async def look(self) -> Look:
        return self.look_at

    def age_s(self, _look: Look) -> float:
        return self.age


class World:
    def __init__(self, root: Path) -> None:
        self.store = CachedStore(root / "cache", FsspecBlobs(f"file://{root}/shared"))
        self.manifests: dict[str, Manifest] = {}
        self.directories = CachedDirectories(self.store, lambda version: self.manifests[version.digest])
        self.engine = Engine()
        self.pinned: set[str] = set()
        self.alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def keeper(self, limit_bytes: int) -> CacheKeeper:
        engine = cast(Any, self.engine)
        return CacheKeeper(
            self.store,
            self.directories,
            cast(Fleet, engine),
            cast(Residency, engine),
            lambda: self.pinned,
            self.alone,
            limit_bytes,
        )

    def put(self, seed: int, root: Path) -> str:
        """A version that was last used at this second since 1970."""
        source = root / f"source-{seed}"
        source.mkdir()
        (source / "adapter_model.safetensors").write_bytes(bytes([seed]) * SIZE_BYTES)
        manifest = manifest_of(source)
        self.store.put_directory(source, manifest)
        self.store.secure(manifest)
        os.utime(self.store.version_dir(manifest.digest), (seed, seed))
        self.manifests[manifest.digest] = manifest
        return manifest.digest


def version(digest: str) -> Version:
    return replace(LORA, digest=digest)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_least_recently_used_versions_make_room_and_the_engine_forgets_them_first(
    world: World, tmp_path: Path
) -> None:
    digests = [world.put(seed, tmp_path) for seed in range(1, 5)]
    on_disk: list[bool] = []
    world.engine.on_unload = lambda digest: on_disk.append(world.store.has_version(digest))
    assert await world.keeper(4 * SIZE_BYTES).make_room() == []
    assert await world.keeper(2 * SIZE_BYTES).make_room() == digests[:2]
    assert (world.engine.forgot, on_disk) == (digests[:2], [True, True])
    assert world.store.used_bytes() == 2 * SIZE_BYTES


async def test_nothing_goes_that_an_engine_may_read(world: World, tmp_path: Path) -> None:
    slot, memory, used, pinned, free = (world.put(seed, tmp_path) for seed in range(1, 6))
    world.engine.look_at = replace(world.engine.look_at, in_slots=frozenset({slot}), in_memory=frozenset({memory}))
    world.engine.used, world.pinned = {used}, {pinned}
    assert await world.keeper(0).make_room() == [free]


async def test_nothing_goes_that_was_used_a_moment_ago(world: World, tmp_path: Path) -> None:
    digest = world.put(1, tmp_path)
    await world.directories.get(version(digest))
    assert await world.keeper(0).make_room() == []


async def test_nothing_goes_while_the_engine_does_not_say_what_it_holds(world: World, tmp_path: Path) -> None:
    digest = world.put(1, tmp_path)
    world.engine.age = 60.0
    assert await world.keeper(0).make_room() == []
    world.engine.age, world.engine.look_at = 0.0, Look(0.0, 1, 0)
    assert await world.keeper(0).make_room() == []
    world.engine.current = None
    assert await world.keeper(0).make_room() == [digest], "no engine reads anything"


async def test_nothing_goes_while_another_gateway_uses_the_directory(world: World, tmp_path: Path) -> None:
    world.put(1, tmp_path)
    here, there = DirectoryUse(tmp_path), DirectoryUse(tmp_path)
    world.alone = here.alone
    with pytest.raises(ConflictError):
        await world.keeper(0).make_room()
    there.release()
    assert len(await world.keeper(0).make_room()) == 1
    here.release()


async def test_nothing_goes_that_is_nowhere_else(world: World, tmp_path: Path) -> None:
    kept, gone = world.put(1, tmp_path), world.put(2, tmp_path)
    for sha256 in world.manifests[kept].blobs:
        world.store.remote.remove(sha256)
        world.store._there.discard(sha256)
    assert await world.keeper(0).make_room() == [gone]


async def test_request_that_comes_while_its_version_goes_gets_it_fetched_anew(world: World, tmp_path: Path) -> None:
    digest = world.put(1, tmp_path)
    came: list[asyncio.Task[Path]] = []
    world.engine.on_unload = lambda _digest: came.append(asyncio.create_task(world.directories.get(version(digest))))
    assert await world.keeper(0).make_room() == [digest]
    directory = await came[0]
    assert (directory / "adapter_model.safetensors").read_bytes() == bytes([1]) * SIZE_BYTES


async def test_waiter_that_gives_up_does_not_end_the_fetch_of_the_others(world: World, tmp_path: Path) -> None:
    digest = world.put(1, tmp_path)
    world.store.drop(digest)
    may_go_on, fetches = threading.Event(), []
    fetch = world.store.fetch

    def slowly(entry: FileEntry) -> Any:
        fetches.append(entry)
        assert may_go_on.wait(10)
        return fetch(entry)

    world.store.fetch = slowly  # type: ignore[method-assign]
    waiters = [asyncio.create_task(world.directories.get(version(digest))) for _ in range(3)]
    await until(lambda: bool(fetches), "the fetch")
    waiters[0].cancel()
    await asyncio.wait([waiters[0]])
    assert waiters[0].cancelled()
    assert digest in world.directories.busy
    may_go_on.set()
    assert (await asyncio.gather(*waiters[1:]))[0].is_dir()
    assert len(fetches) == 1
