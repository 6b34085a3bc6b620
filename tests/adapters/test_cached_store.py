"""A store whose bytes lie elsewhere, too: fetched once, verified, dropped when the budget is spent; against fakes for
what has to happen at one moment, and against a server that speaks S3 for the rest."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from loradock_adapters import blob_store
from loradock_adapters.blob_store import FsspecBlobs
from loradock_adapters.cached_store import CachedStore
from loradock_adapters.errors import (
    CorruptBlobError,
    DigestMismatchError,
    MissingBlobsError,
    StoreUnavailableError,
    UsageError,
)
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.store import LocalStore
from loradock_testing.s3_server import S3Server, environment, s3_server


class FakeBlobs:
    """A BlobStore in memory that does what a test tells it."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.reads: list[str] = []
        self.writes: list[str] = []
        self.before_read: Callable[[], None] = lambda: None
        self.down = False

    def size_bytes(self, sha256: str) -> int | None:
        self._check()
        return len(self.contents[sha256]) if sha256 in self.contents else None

    def read(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        before_read = self.before_read
        self.reads.append(sha256)
        before_read()
        self._check()
        if sha256 not in self.contents:
            raise FileNotFoundError(sha256)
        yield self.contents[sha256][:size_bytes]

    def write(self, sha256: str, path: Path) -> None:
        self._check()
        self.writes.append(sha256)
        self.contents[sha256] = path.read_bytes()

    def remove(self, sha256: str) -> None:
        self.contents.pop(sha256, None)

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailableError("down", retry_after_s=5)


def manifest_of(contents: dict[str, bytes]) -> Manifest:
    return Manifest(
        tuple(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(contents.items()))
    )


def files(seed: int, size_bytes: int = 1000) -> dict[str, bytes]:
    return {"adapter_config.json": b"{%d}" % seed, "adapter_model.safetensors": bytes([seed % 256]) * size_bytes}


def put(store: CachedStore, contents: dict[str, bytes]) -> Manifest:
    """As an upload and a publish do."""
    manifest = manifest_of(contents)
    for entry in manifest.files:
        with store.writer(entry.sha256, entry.size_bytes) as writer:
            writer.write(contents[entry.path])
    store.materialise(manifest)
    store.secure(manifest)
    return manifest


def waiting_for(event: threading.Event) -> None:
    assert event.wait(10)


@pytest.fixture
def remote() -> FakeBlobs:
    return FakeBlobs()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server, environment(server.environment):
        yield server


def test_what_one_store_publishes_another_one_has(tmp_path: Path, remote: FakeBlobs) -> None:
    here, there = CachedStore(tmp_path / "a", remote), CachedStore(tmp_path / "b", remote)
    manifest = put(here, files(1))
    directory = there.materialise(manifest)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files(1)
    assert there.materialise(manifest) == directory
    assert len(remote.reads) == 2, "each content once, and none for a version that is there"


def test_contents_that_are_there_are_not_sent_again(tmp_path: Path, remote: FakeBlobs) -> None:
    put(CachedStore(tmp_path / "a", remote), files(1))
    assert len(remote.writes) == 2
    put(CachedStore(tmp_path / "b", remote), files(1))
    assert len(remote.writes) == 2


def test_content_that_is_in_neither_store_is_named(tmp_path: Path, remote: FakeBlobs) -> None:
    store = CachedStore(tmp_path, remote)
    manifest = manifest_of(files(1))
    with pytest.raises(MissingBlobsError) as caught:
        store.materialise(manifest)
    assert set(caught.value.missing) == set(manifest.blobs)


def test_many_first_requests_for_one_version_make_one_download_of_each_content(
    tmp_path: Path, remote: FakeBlobs
) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    may_go_on = threading.Event()
    remote.before_read = partial(waiting_for, may_go_on)
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(store.materialise, manifest) for _ in range(20)]
        may_go_on.set()
        assert {future.result() for future in asked} == {store.version_dir(manifest.digest)}
    assert sorted(remote.reads) == sorted(manifest.blobs)


def test_slow_download_holds_only_who_asks_for_it(tmp_path: Path, remote: FakeBlobs) -> None:
    writer = CachedStore(tmp_path / "a", remote)
    slow, quick = put(writer, files(1)), put(writer, files(2))
    store = CachedStore(tmp_path / "b", remote)
    may_go_on = threading.Event()
    remote.before_read = partial(waiting_for, may_go_on)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(store.materialise, slow)
        while len(remote.reads) < 2:
            time.sleep(0.001)
        remote.before_read = lambda: None
        assert store.materialise(quick).is_dir()
        assert not waits.done()
        may_go_on.set()
        assert waits.result().is_dir()


def test_download_that_failed_is_tried_again_by_the_next_request(tmp_path: Path, remote: FakeBlobs) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    remote.down = True
    with pytest.raises(StoreUnavailableError):
        store.materialise(manifest)
    assert not store.has_version(manifest.digest)
    remote.down = False
    assert store.materialise(manifest).is_dir()


def test_error_leaves_no_download_behind_that_would_fail_the_next_request(tmp_path: Path, remote: FakeBlobs) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    may_go_on = threading.Event()
    is_held = iter([False, True])

    def one_fails_at_once_the_other_late() -> None:
        if next(is_held):
            waiting_for(may_go_on)

    remote.before_read, remote.down = one_fails_at_once_the_other_late, True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.materialise, manifest)
        with pytest.raises(TimeoutError):
            asked.result(0.2)
        may_go_on.set()
        with pytest.raises(StoreUnavailableError):
            asked.result()
    remote.before_read, remote.down = (lambda: None), False
    assert store.materialise(manifest).is_dir()


def test_version_is_there_though_one_that_shares_a_content_makes_room_meanwhile(
    tmp_path: Path, remote: FakeBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = files(1)
    one, two = (put(CachedStore(tmp_path / "a", remote), contents | {"README.md": text}) for text in (b"1", b"2"))
    store = CachedStore(tmp_path / "b", remote)
    store.materialise(one)
    materialise = LocalStore.materialise
    freed: list[int | None] = []

    def after_room_was_made(self: LocalStore, manifest: Manifest) -> Path:
        if not freed:
            freed.append(store.drop(one.digest))
        return materialise(self, manifest)

    monkeypatch.setattr(LocalStore, "materialise", after_room_was_made)
    directory = store.materialise(two)
    assert freed[0]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == contents | {"README.md": b"2"}


def test_damaged_content_is_tried_twice_and_never_kept(tmp_path: Path, remote: FakeBlobs) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    good = dict(remote.contents)
    damaged = next(iter(manifest.blobs))
    remote.contents[damaged] = b"x" * len(good[damaged])
    with pytest.raises(CorruptBlobError, match=damaged):
        store.materialise(manifest)
    assert remote.reads.count(damaged) == 2
    assert not store.has_blob(damaged)
    assert not store.has_version(manifest.digest)
    remote.contents = good
    assert store.materialise(manifest).is_dir()


@pytest.mark.parametrize("difference", [-1, 1])
def test_manifest_with_another_size_is_what_is_wrong_and_not_the_store(
    tmp_path: Path, remote: FakeBlobs, difference: int
) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    first, *others = manifest.files
    wrong = Manifest((replace(first, size_bytes=first.size_bytes + difference), *others))
    with pytest.raises(DigestMismatchError, match=f"says {first.size_bytes + difference} bytes.* {first.size_bytes}"):
        store.materialise(wrong)
    assert store.materialise(manifest).is_dir()


def test_damage_that_is_gone_at_the_second_download_is_no_error(tmp_path: Path, remote: FakeBlobs) -> None:
    manifest = put(CachedStore(tmp_path / "a", remote), files(1))
    store = CachedStore(tmp_path / "b", remote)
    good = dict(remote.contents)
    remote.contents = {sha256: b"?" * len(data) for sha256, data in good.items()}

    def mend() -> None:
        if max(map(remote.reads.count, remote.reads)) > 1:
            remote.contents = good

    remote.before_read = mend
    assert store.materialise(manifest).is_dir()


def test_least_recently_used_is_told_and_dropped_and_fetched_again(tmp_path: Path, remote: FakeBlobs) -> None:
    store = CachedStore(tmp_path, remote)
    manifests = [put(store, files(seed)) for seed in range(5)]
    for age, manifest in enumerate(manifests):
        os.utime(store.version_dir(manifest.digest), (age, age))
    assert store.materialise(manifests[0]).is_dir(), "used now, so it is the newest"
    assert store.used_bytes() == 5 * 1003
    assert store.oldest(time.time() - 60) == [manifest.digest for manifest in manifests[1:]]
    assert store.drop(manifests[2].digest) == 1003
    assert store.used_bytes() == 4 * 1003
    assert [store.has_version(manifest.digest) for manifest in manifests] == [True, True, False, True, True]
    assert store.here(manifests[2].digest) is None
    assert store.materialise(manifests[2]).is_dir(), "it is fetched again"


def test_drop_keeps_bytes_that_others_share_and_those_that_are_nowhere_else(tmp_path: Path, remote: FakeBlobs) -> None:
    store = CachedStore(tmp_path, remote)
    one = put(store, {"a.json": b"shared", "b.json": b"one"})
    two = put(store, {"a.json": b"shared", "b.json": b"two"})
    shared = next(entry.sha256 for entry in one.files if entry.path == "a.json")
    assert store.drop(one.digest) == 3
    assert store.has_blob(shared)
    assert store.missing_blobs(two) == []
    only_here = CachedStore(tmp_path, FakeBlobs())
    assert only_here.drop(two.digest) is None
    assert only_here.has_version(two.digest)


def test_s3_many_first_requests_make_one_get_for_each_content(tmp_path: Path, s3: S3Server) -> None:
    url = s3.new_bucket()
    manifest = put(CachedStore(tmp_path / "a", FsspecBlobs(url)), files(1, 100_000))
    store = CachedStore(tmp_path / "b", FsspecBlobs(url))
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(store.materialise, [manifest] * 16)) == {store.version_dir(manifest.digest)}
    assert {sha256: s3.asked("GET", sha256) for sha256 in manifest.blobs} == dict.fromkeys(manifest.blobs, 1)


def test_s3_large_content_goes_in_parts_both_ways(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_store, "UPLOAD_PART_BYTES", 5 * 1024**2)
    monkeypatch.setattr(blob_store, "PART_BYTES", 3 * 1024**2)
    url = s3.new_bucket()
    data = os.urandom(11 * 1024**2)
    manifest = put(CachedStore(tmp_path / "a", FsspecBlobs(url)), {"w.safetensors": data})
    (sha256,) = manifest.blobs
    assert s3.asked("PUT", sha256) == 3
    directory = CachedStore(tmp_path / "b", FsspecBlobs(url)).materialise(manifest)
    assert (directory / "w.safetensors").read_bytes() == data
    assert s3.asked("GET", sha256) == 4


@pytest.mark.parametrize("damaged", [b"", b"x" * 999, b"x" * 1000, b"x" * 2000])
def test_s3_damaged_object_is_an_error_that_says_so(tmp_path: Path, s3: S3Server, damaged: bytes) -> None:
    url = s3.new_bucket()
    manifest = put(CachedStore(tmp_path / "a", FsspecBlobs(url)), files(1))
    sha256 = next(entry.sha256 for entry in manifest.files if entry.size_bytes == 1000)
    s3.overwrite(url, sha256, damaged)
    store = CachedStore(tmp_path / "b", FsspecBlobs(url))
    with pytest.raises(CorruptBlobError, match=sha256):
        store.materialise(manifest)
    assert not store.has_blob(sha256)


def test_s3_object_that_is_gone_and_bucket_that_is_not_there(tmp_path: Path, s3: S3Server) -> None:
    url = s3.new_bucket()
    blobs = FsspecBlobs(url)
    manifest = put(CachedStore(tmp_path / "a", blobs), files(1))
    for sha256 in manifest.blobs:
        blobs.remove(sha256)
        blobs.remove(sha256)
        assert blobs.size_bytes(sha256) is None
    with pytest.raises(MissingBlobsError):
        CachedStore(tmp_path / "b", blobs).materialise(manifest)
    nowhere = CachedStore(tmp_path / "a", FsspecBlobs("s3://there-is-no-such-bucket/x"))
    with pytest.raises(StoreUnavailableError):
        nowhere.secure(manifest)


def test_s3_server_that_is_away_or_silent_is_told_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with s3_server() as server, environment(server.environment):
        url = server.new_bucket()
        manifest = put(CachedStore(tmp_path / "a", FsspecBlobs(url)), files(1))
        store = CachedStore(tmp_path / "b", FsspecBlobs(url))
        with monkeypatch.context() as patch:
            patch.setattr(blob_store, "READ_TIMEOUT_S", 0.3)
            impatient = CachedStore(tmp_path / "b", FsspecBlobs(url))
        server.suspend()
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as caught:
            impatient.materialise(manifest)
        server.go_on()
        assert caught.value.retry_after_s > 0
        assert store.materialise(manifest).is_dir()
        server.stop()
        other = put_locally(CachedStore(tmp_path / "c", FsspecBlobs(url)), files(2))
        with pytest.raises(StoreUnavailableError):
            CachedStore(tmp_path / "c", FsspecBlobs(url)).secure(other)
        assert store.materialise(manifest).is_dir(), "what is here needs nobody"
    assert time.monotonic() - began < 60
    assert "test-secret-key" not in caplog.text


def put_locally(store: CachedStore, contents: dict[str, bytes]) -> Manifest:
    manifest = manifest_of(contents)
    for entry in manifest.files:
        with store.writer(entry.sha256, entry.size_bytes) as writer:
            writer.write(contents[entry.path])
    return manifest


def test_any_url_that_fsspec_knows_is_a_store(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    manifest = put(CachedStore(tmp_path / "a", FsspecBlobs(url)), files(1))
    assert CachedStore(tmp_path / "b", FsspecBlobs(url)).materialise(manifest).is_dir()


def test_url_that_nothing_speaks_is_refused() -> None:
    with pytest.raises(UsageError, match="nosuch://"):
        FsspecBlobs("nosuch://bucket/prefix")
