"""Collecting what no name has any more: what goes, what stays and why, also beside publishes."""

import asyncio
import fcntl
import hashlib
import os
import random
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradock_adapters.errors import MissingBlobsError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import UploadLimits, Uploads
from loradock_serve.collector import Collected, Collector
from loradock_serve.data_dir import DirectoryUse
from loradock_serve.errors import ConflictError
from loradock_serve.turns import Turns

SHARED = Verdict("lora", "shared", (), 8)
KEEP_S = 1000.0


class Engine:
    """Whoever reads files, as a test says."""

    def __init__(self) -> None:
        self.uses: dict[str, str] = {}
        self.names: set[str] | None = set()
        self.forgets = True
        self.told: list[str] = []

    def use_of(self, digest: str) -> str | None:
        return self.uses.get(digest)

    async def engine_names(self) -> Collection[str] | None:
        return None if self.names is None else set(self.names)

    async def let_go(self, digest: str) -> None:
        self.told.append(digest)
        if self.forgets and self.names is not None:
            self.names.discard(digest)


class World:
    """A store, a registry and an engine, and the collector of all three."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        self.registry = Registry(f"sqlite:///{root}/registry.db")
        self.uploads = Uploads(self.store, UploadLimits(1 << 40, 1000, KEEP_S))
        self.engine = Engine()
        self.turns = Turns()
        self.copies_root = root / "merged"
        parts = (self.store, self.registry, self.uploads, self.engine, self.copies, self.turns, KEEP_S)
        self.collector = Collector(*parts, DirectoryUse(root).alone)

    def copies(self) -> dict[str, list[Path]]:
        paths = self.copies_root.glob("*") if self.copies_root.is_dir() else ()
        return {f"sha256:{path.name.partition('-')[0]}": [path] for path in paths}

    def put(self, content: bytes, *, waits: bool = False) -> FileEntry:
        """A content in the store; `waits`: as an upload that is to be published."""
        sha256 = hashlib.sha256(content).hexdigest()
        if waits:
            upload = self.uploads.begin("ada", sha256, len(content), None)
            with upload:
                upload.write([content])
                upload.finish()
        elif not self.store.has_blob(sha256):
            with self.store.writer(sha256, len(content)) as writer:
                writer.write(content)
        return FileEntry(f"{sha256[:8]}.json", len(content), sha256)

    def publish(self, name: str, *contents: str) -> str:
        manifest = Manifest(tuple(self.put(content.encode()) for content in contents))
        self.store.materialise(manifest)
        self.registry.publish(name, manifest, SHARED)
        return manifest.digest

    async def collect(self, *, dry_run: bool = False) -> Collected:
        return await self.collector.collect(dry_run=dry_run)

    def contents(self) -> set[str]:
        return {self.store.blob_path(sha256).read_bytes().decode() for sha256, _ in self.store.stored_blobs()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.registry.close()


async def test_removed_version_goes_with_the_contents_that_only_it_had(world: World) -> None:
    gone, kept = world.publish("a", "config", "own"), world.publish("b", "config", "other")
    world.registry.delete("a")
    would = await world.collect(dry_run=True)
    assert (would.versions, would.contents, would.freed_bytes) == ([gone], 1, len("own"))
    assert world.store.has_version(gone)
    did = await world.collect()
    assert (did.versions, did.contents, did.freed_bytes, did.kept) == ([gone], 1, len("own"), {})
    assert world.store.stored_versions() == [kept]
    assert world.contents() == {"config", "other"}
    assert (await world.collect()).to_json()["freed_bytes"] == 0


async def test_bytes_that_any_version_of_any_name_has_stay(world: World) -> None:
    old = world.publish("a", "one")
    world.publish("a", "two")
    world.publish("b", "one")
    world.registry.delete_version("a", 1)
    assert (await world.collect()).versions == []
    world.registry.delete("b")
    assert (await world.collect()).versions == [old]
    assert world.contents() == {"two"}


@pytest.mark.parametrize("use", ["requests are answered with it", "its own engine is starting"])
async def test_version_in_use_stays_and_is_reported(world: World, use: str) -> None:
    digest = world.publish("a", "x")
    world.registry.delete("a")
    world.engine.uses[digest] = use
    assert (await world.collect()).kept == {digest: use}
    assert (world.store.has_version(digest), world.contents()) == (True, {"x"})
    world.engine.uses.clear()
    assert (await world.collect()).versions == [digest]


async def test_engine_is_told_to_forget_before_files_go(world: World) -> None:
    digest = world.publish("a", "x")
    world.registry.delete("a")
    world.engine.names = {digest}
    assert (await world.collect(dry_run=True)).versions == [digest]
    assert world.engine.told == []
    assert (await world.collect()).versions == [digest]
    assert world.engine.told == [digest]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (None, "the base's engine does not say what it has loaded"),
        ({"unnamed:7"}, "the base's engine still answers requests with an adapter that it was told to forget"),
        ({"{digest}"}, "the base's engine has it loaded"),
    ],
)
async def test_files_that_the_engine_may_read_stay(world: World, names: set[str] | None, why: str) -> None:
    digest = world.publish("a", "x")
    world.registry.delete("a")
    world.engine.names = names and {name.format(digest=digest) for name in names}
    world.engine.forgets = False
    assert (await world.collect()).kept == {digest: why}
    assert world.store.has_version(digest)


async def test_contents_without_a_version_stay_until_they_are_old_and_nobody_waits(world: World) -> None:
    young, old = world.put(b"young"), world.put(b"old")
    waiting = world.put(b"waiting", waits=True)
    for entry in (old, waiting):
        os.utime(world.store.blob_path(entry.sha256), (1, 1))
    assert (await world.collect(dry_run=True)).freed_bytes == len("old")
    assert world.contents() == {"young", "old", "waiting"}
    assert (await world.collect()).contents == 1
    assert world.contents() == {"young", "waiting"}
    world.uploads.published([waiting.sha256])
    assert world.store.has_blob(young.sha256)


async def test_merges_and_packed_forms_go_with_their_version(world: World) -> None:
    gone, kept = world.publish("a", "x"), world.publish("b", "y")
    for digest in (gone, kept):
        directory = world.copies_root / f"{digest.removeprefix('sha256:')}-base"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(b"12345")
    world.registry.delete("a")
    report = await world.collect()
    assert (report.copies, report.freed_bytes) == (1, 1 + 5)
    assert list(world.copies()) == [kept]


async def test_content_that_is_published_while_it_is_collected_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publish that begins after the registry was asked, and ends before its content's turn comes."""
    entry = world.put(b"old")
    os.utime(world.store.blob_path(entry.sha256), (1, 1))
    manifest = Manifest((entry,))
    needed = world.registry.blobs

    def publish_behind_it() -> set[str]:
        before = needed()
        with world.uploads.publishing(manifest.blobs):
            world.registry.publish("a", manifest, SHARED)
        return before

    monkeypatch.setattr(world.registry, "blobs", publish_behind_it)
    assert (await world.collect()).contents == 0
    assert world.store.has_blob(entry.sha256)


async def test_collecting_beside_another_gateway_is_refused(world: World) -> None:
    digest = world.publish("a", "x")
    world.registry.delete("a")
    other = DirectoryUse(world.store.root)
    with pytest.raises(ConflictError, match="Another gateway uses this data_dir"):
        await world.collect()
    assert (await world.collect(dry_run=True)).versions == [digest]
    other.release()
    assert (await world.collect()).versions == [digest]


def test_directory_is_held_until_the_last_who_is_alone_on_it_leaves(tmp_path: Path) -> None:
    here, other = DirectoryUse(tmp_path), DirectoryUse(tmp_path)
    other.release()
    with here.alone():
        with here.alone():
            pass
        with pytest.raises(BlockingIOError), (tmp_path / "users.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with (tmp_path / "users.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(ConflictError), DirectoryUse(tmp_path).alone():
        pass  # `here` still uses it
    here.release()


names = st.sampled_from(["a", "b"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), names, st.sets(st.integers(0, 4), min_size=1, max_size=2)),
        st.tuples(st.just("remove"), names),
        st.tuples(st.just("use"), st.integers(0, 9)),
        st.tuples(st.just("collect"), st.booleans()),
    ),
    max_size=12,
)


@settings(max_examples=25)
@given(steps)
def test_whatever_happens_what_is_needed_is_whole_and_the_rest_goes(happens: list[tuple[object, ...]]) -> None:
    async def run(world: World) -> None:
        seen: list[str] = []
        for step in happens:
            match step:
                case ("publish", str(name), set(contents)):
                    seen.append(world.publish(name, *map(str, contents)))
                case ("remove", str(name)) if any(v.name == name for v in world.registry.models()):
                    world.registry.delete(name)
                case ("use", int(which)) if seen:
                    digest = seen[which % len(seen)]
                    if world.engine.uses.pop(digest, None) is None and world.store.has_version(digest):
                        world.engine.uses[digest] = "used"
                case ("collect", bool(dry_run)):
                    await world.collect(dry_run=dry_run)
            needed = world.registry.digests() | world.engine.uses.keys()
            assert needed <= set(world.store.stored_versions())
            assert world.registry.blobs() <= {sha256 for sha256, _ in world.store.stored_blobs()}
        world.engine.uses.clear()
        await world.collect()
        assert set(world.store.stored_versions()) == world.registry.digests()
        assert {sha256 for sha256, _ in world.store.stored_blobs()} == world.registry.blobs()

    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        try:
            asyncio.run(run(world))
        finally:
            world.registry.close()


async def test_publishes_and_removals_beside_collections_lose_nothing(world: World) -> None:
    """Threads publish and remove while it is collected again and again; every version that has a name is whole."""
    chance = random.Random(7)

    async def publisher(name: str) -> int:
        made = 0
        for turn in range(12):
            contents = [f"{name}{chance.randrange(4)}".encode(), f"shared{turn % 3}".encode()]
            manifest = Manifest(tuple([await asyncio.to_thread(world.put, content) for content in contents]))
            async with world.turns.of(manifest.digest):
                with world.uploads.publishing(manifest.blobs):
                    try:
                        await asyncio.to_thread(world.store.materialise, manifest)
                    except MissingBlobsError:
                        continue  # collected between upload and publish: the client is told, and sends it again
                    await asyncio.to_thread(world.registry.publish, name, manifest, SHARED)
                    made += 1
            if chance.random() < 0.4:
                await asyncio.to_thread(world.registry.delete, name)
        return made

    done = asyncio.Event()

    async def collector() -> None:
        while not done.is_set():
            await world.collect()

    collecting = asyncio.create_task(collector())
    made = await asyncio.gather(*(publisher(name) for name in ("a", "b", "c")))
    done.set()
    await collecting
    assert min(made) > 0
    for version in world.registry.models():
        for number in world.registry.versions(version.name):
            directory = world.store.version_dir(number.digest)
            for entry in world.registry.manifest(number).files:
                assert hashlib.sha256((directory / entry.path).read_bytes()).hexdigest() == entry.sha256
                assert world.store.has_blob(entry.sha256)
    await world.collect()
    assert set(world.store.stored_versions()) == world.registry.digests()
