"""Uploads that nobody has published yet: who sees them, what they may take, and when they go."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from loradock_adapters import uploads as uploads_module
from loradock_adapters.errors import (
    DigestMismatchError,
    NoRoomError,
    UploadBusyError,
    UploadQuotaError,
    WrongOffsetError,
)
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import UploadLimits, Uploads

CONTENT = b"some weights"
SHA = hashlib.sha256(CONTENT).hexdigest()
TOTAL = len(CONTENT)
LIMITS = UploadLimits(max_bytes=1000, max_files=3, keep_s=100.0)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def uploads(store: LocalStore) -> Uploads:
    return Uploads(store, LIMITS)


def files(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def put(uploads: Uploads, content: bytes, publisher: str = "ann") -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    with uploads.begin(publisher, sha256, len(content), None) as upload:
        upload.write([content])
        upload.finish()
    return sha256


def begun(uploads: Uploads, content: bytes = CONTENT[:5], publisher: str = "ann", total: int = TOTAL) -> None:
    with uploads.begin(publisher, SHA, total, 0) as upload:
        upload.write([content])


def age(store: LocalStore, seconds: float) -> None:
    for path in (store.root / "uploads").rglob("*.*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_pieces_across_restarts_become_a_blob(store: LocalStore, uploads: Uploads) -> None:
    begun(uploads)
    again = Uploads(LocalStore(store.root), LIMITS)
    assert again.held_bytes("ann", SHA) == 5
    with again.begin("ann", SHA, TOTAL, 5) as upload:
        upload.write([CONTENT[5:7], CONTENT[7:]])
        assert not store.has_blob(SHA)
        upload.finish()
    assert store.blob_path(SHA).read_bytes() == CONTENT
    assert store.blob_path(SHA).stat().st_mode & 0o777 == 0o444
    assert files(store) == [f"blobs/{SHA[:2]}/{SHA}", f"uploads/ann/{SHA}.{TOTAL}.whole"]


def test_publishers_do_not_see_each_others_uploads(uploads: Uploads) -> None:
    begun(uploads)
    assert uploads.held_bytes("bob", SHA) == 0
    begun(uploads, publisher="bob")
    with pytest.raises(ValueError, match=r"\.\./ann"):
        uploads.held_bytes("../ann", SHA)


def test_piece_elsewhere_than_at_the_end_is_told_where_that_is(uploads: Uploads) -> None:
    begun(uploads)
    for offset in (0, 4, 6):
        with pytest.raises(WrongOffsetError) as caught:
            uploads.begin("ann", SHA, TOTAL, offset)
        assert caught.value.held_bytes == 5


def test_second_writer_is_refused_until_the_first_is_done(uploads: Uploads, store: LocalStore) -> None:
    first = uploads.begin("ann", SHA, TOTAL, None)
    for offset in (0, None):
        with pytest.raises(UploadBusyError):
            Uploads(store, LIMITS).begin("ann", SHA, TOTAL, offset)
    first.close()
    first.close()
    first.write([CONTENT])  # too late: nothing
    assert uploads.held_bytes("ann", SHA) == 0
    put(uploads, CONTENT)


def test_writer_who_comes_late_does_not_remove_what_another_has_begun_anew(
    uploads: Uploads, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(uploads)
    lock = uploads_module._lock
    opened = iter([True])
    others: list[uploads_module.Upload] = []

    def lock_late(descriptor: int, path: Path) -> None:
        if next(opened, False):
            others.append(uploads.begin("ann", SHA, TOTAL, None))
        lock(descriptor, path)

    monkeypatch.setattr(uploads_module, "_lock", lock_late)
    with pytest.raises(UploadBusyError):
        uploads.begin("ann", SHA, TOTAL, None)
    with others[0] as upload:
        upload.write([CONTENT])
        upload.finish()
    assert store.blob_path(SHA).read_bytes() == CONTENT


def test_wrong_bytes_and_too_many_are_refused(uploads: Uploads, store: LocalStore) -> None:
    with uploads.begin("ann", SHA, TOTAL, None) as upload:
        with pytest.raises(DigestMismatchError, match="announced 12"):
            upload.write([CONTENT, b"!"])
        with pytest.raises(DigestMismatchError, match="0 of the announced 12"):
            upload.finish()
        upload.write([b"other bytes!"])
        with pytest.raises(DigestMismatchError, match="the bytes have the sha256"):
            upload.finish()
    assert files(store) == []


def test_limits_count_what_is_announced_and_not_what_is_published(uploads: Uploads) -> None:
    begun(uploads, total=900)
    with pytest.raises(UploadQuotaError, match="101 bytes more beside the 900"):
        uploads.check("ann", "ab" * 32, 101)
    uploads.check("ann", SHA, 900)  # it is counted already
    uploads.check("bob", "ab" * 32, 1000)
    names = [put(uploads, bytes([number])) for number in range(2)]
    with pytest.raises(UploadQuotaError, match="3 uploaded files wait to be published, and 3 may"):
        uploads.check("ann", "ab" * 32, 1)
    uploads.published(names)
    uploads.check("ann", "ab" * 32, 100)


def test_room_that_running_uploads_were_promised_is_taken(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "free_bytes", lambda _directory: 20)
    first = uploads.begin("ann", SHA, TOTAL, None)
    with pytest.raises(NoRoomError, match="9 bytes are still to come, and 8 are free"):
        uploads.check("bob", "ab" * 32, 9)
    uploads.check("bob", "ab" * 32, 8)
    first.close()
    uploads.check("bob", "ab" * 32, 20)


def test_sweep_removes_what_has_expired_and_nobody_writes(uploads: Uploads, store: LocalStore) -> None:
    begun(uploads)
    whole = put(uploads, b"whole")
    age(store, 99)
    assert uploads.sweep(set) == 0
    age(store, 2)
    held = uploads.begin("bob", SHA, TOTAL, None)
    age(store, 200)
    assert uploads.sweep(set) == 2
    assert files(store) == [f"uploads/bob/{SHA}.{TOTAL}"]
    assert not store.has_blob(whole)
    held.close()
    assert uploads.sweep(set) == 1
    assert files(store) == []


def test_sweep_keeps_what_a_version_needs_or_is_about_to(uploads: Uploads, store: LocalStore) -> None:
    needed, coming = put(uploads, b"needed"), put(uploads, b"coming")
    age(store, 200)
    with uploads.publishing([coming]):
        assert uploads.sweep(lambda: {needed}) == 0
    assert files(store) == [
        *sorted(f"blobs/{name[:2]}/{name}" for name in (needed, coming)),
        f"uploads/ann/{coming}.6.whole",
    ]


def test_refused_upload_drops_what_is_cheap_to_send_again(
    uploads: Uploads, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "CHEAP_TO_RESEND_BYTES", 5)
    small, large, needed = (put(uploads, content) for content in (b"small", b"larger", b"need"))
    others = put(uploads, b"bobs", "bob")
    sizes = {small: 5, large: 6, needed: 4, others: 4}
    manifest = Manifest(tuple(FileEntry(f"{name}.json", size, name) for name, size in sizes.items()))
    uploads.refused("ann", manifest, lambda: {needed})
    assert [store.has_blob(name) for name in sizes] == [False, True, True, True]


def test_same_content_from_many_threads_is_one_whole_blob(uploads: Uploads, store: LocalStore) -> None:
    barrier = threading.Barrier(8)
    outcomes: list[str] = []

    def bring() -> None:
        barrier.wait()
        try:
            put(uploads, CONTENT)
        except UploadBusyError:
            outcomes.append("busy")
        else:
            outcomes.append("stored")

    threads = [threading.Thread(target=bring) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert "stored" in outcomes
    assert files(store) == [f"blobs/{SHA[:2]}/{SHA}", f"uploads/ann/{SHA}.{TOTAL}.whole"]
    assert store.blob_path(SHA).read_bytes() == CONTENT
