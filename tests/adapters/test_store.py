"""The store: what is visible is whole, whatever is broken, killed or done twice."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradock_adapters.errors import DigestMismatchError, MissingBlobsError, NotFoundError
from loradock_adapters.manifest import FileEntry, Manifest, manifest_of
from loradock_adapters.store import LocalStore
from loradock_testing.checkpoints import write_adapter, write_full

CONTENT = b"some weights"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_writer_whole_content_becomes_a_blob(store: LocalStore) -> None:
    with store.writer(SHA, len(CONTENT)) as writer:
        writer.write(CONTENT[:5])
        assert not store.has_blob(SHA)
        writer.write(CONTENT[5:])
    assert store.has_blob(SHA)
    assert store.blob_path(SHA).read_bytes() == CONTENT
    assert store.blob_path(SHA).stat().st_mode & 0o777 == 0o444
    assert len(files_in(store.root)) == 1


def test_writer_empty_content_becomes_a_blob(store: LocalStore) -> None:
    sha = hashlib.sha256(b"").hexdigest()
    with store.writer(sha, 0):
        pass
    assert store.has_blob(sha)


@pytest.mark.parametrize(
    ("sent", "announced"), [(b"other bytes!", None), (CONTENT[:-1], 12), (CONTENT + b"!", 12), (b"", 12), (b"", None)]
)
def test_writer_other_bytes_than_announced_leave_nothing(store: LocalStore, sent: bytes, announced: int | None) -> None:
    with pytest.raises(DigestMismatchError), store.writer(SHA, announced) as writer:
        writer.write(sent)
    assert files_in(store.root) == []


def test_writer_too_many_bytes_refused_before_they_are_written(store: LocalStore) -> None:
    writer = store.writer(SHA, 4)
    with pytest.raises(DigestMismatchError, match="announced 4 bytes"):
        writer.write(b"12345")
    writer.abort()
    assert files_in(store.root) == []


def test_writer_exception_leaves_nothing(store: LocalStore) -> None:
    def broken_upload() -> None:
        with store.writer(SHA) as writer:
            writer.write(CONTENT)
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        broken_upload()
    assert files_in(store.root) == []


def test_writer_abort_after_commit_is_harmless(store: LocalStore) -> None:
    writer = store.writer(SHA)
    writer.write(CONTENT)
    writer.commit()
    writer.abort()
    assert store.has_blob(SHA)


def test_writer_same_content_from_many_threads_is_one_whole_blob(store: LocalStore) -> None:
    barrier = threading.Barrier(8)

    def put() -> None:
        barrier.wait()
        with store.writer(SHA, len(CONTENT)) as writer:
            writer.write(CONTENT)

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in files_in(store.root)] == [CONTENT]


@pytest.mark.parametrize(
    "sha256", ["", "../../etc/passwd", "AB" * 32, "ab" * 31, f"sha256:{SHA}", f"{SHA}\n", "a" * 64 + "/"]
)
def test_blob_path_anything_but_hex_not_found(store: LocalStore, sha256: str) -> None:
    with pytest.raises(NotFoundError):
        store.has_blob(sha256)
    with pytest.raises(NotFoundError):
        store.version_dir(f"sha256:{sha256}x")


def test_materialise_version_has_the_manifests_files_read_only(store: LocalStore, tmp_path: Path) -> None:
    source = write_full(tmp_path / "model", shards=2)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "a.jinja").write_text("x")
    manifest = manifest_of(source)
    directory = store.put_directory(source, manifest)
    assert directory == store.version_dir(manifest.digest) == store.root / "versions" / manifest.digest[7:]
    assert manifest_of(directory).digest == manifest.digest
    assert directory.stat().st_mode & 0o777 == 0o555
    assert (directory / "additional_chat_templates").stat().st_mode & 0o777 == 0o555
    for file in manifest.files:
        assert (directory / file.path).samefile(store.blob_path(file.sha256))


def test_materialise_twice_is_the_same_directory(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a"))
    first = store.put_directory(tmp_path / "a", manifest)
    inode = first.stat().st_ino
    assert store.materialise(manifest).stat().st_ino == inode


def test_materialise_missing_blobs_names_all_and_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a"))
    with pytest.raises(MissingBlobsError) as caught:
        store.materialise(manifest)
    assert set(caught.value.missing) == set(manifest.blobs) == set(store.missing_blobs(manifest))
    assert files_in(store.root) == []
    assert not store.has_version(manifest.digest)


def test_materialise_size_that_the_blob_has_not_leaves_nothing(store: LocalStore) -> None:
    with store.writer(SHA) as writer:
        writer.write(CONTENT)
    manifest = Manifest((FileEntry("a.json", 99, SHA),))
    with pytest.raises(DigestMismatchError, match=r"99 bytes.* has 12"):
        store.materialise(manifest)
    assert list((store.root / "versions").iterdir()) == []


def test_materialise_from_many_threads_is_one_whole_version(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a"))
    for file in manifest.files:
        store.put_file(tmp_path / "a" / file.path, file)
    barrier = threading.Barrier(8)
    made: list[Path] = []

    def make() -> None:
        barrier.wait()
        made.append(store.materialise(manifest))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [store.version_dir(manifest.digest)] * 8
    assert list((store.root / "versions").iterdir()) == [store.version_dir(manifest.digest)]
    assert manifest_of(made[0]) == manifest


def test_put_file_changed_while_it_was_read_refused(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(DigestMismatchError):
        store.put_directory(tmp_path / "a", manifest)
    assert not store.has_version(manifest.digest)


def test_discard_version_removes_the_directory_and_keeps_the_blobs(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a"))
    store.put_directory(tmp_path / "a", manifest)
    store.discard_version(manifest.digest)
    store.discard_version(manifest.digest)
    assert not store.has_version(manifest.digest)
    assert list((store.root / "versions").iterdir()) == []
    assert store.missing_blobs(manifest) == []
    assert store.materialise(manifest).is_dir()


def test_sweep_spares_a_living_writer(store: LocalStore) -> None:
    with store.writer(SHA) as writer:
        writer.write(CONTENT)
        assert LocalStore(store.root).sweep() == 0
    assert store.has_blob(SHA)


def test_sweep_removes_what_nobody_holds(store: LocalStore) -> None:
    (store.root / "tmp" / "left").write_bytes(b"x")
    partial = store.root / "versions" / ".partial-left"
    (partial / "additional_chat_templates").mkdir(parents=True)
    partial.chmod(0o555)
    assert LocalStore(store.root).sweep() == 0  # the opening swept already
    assert files_in(store.root) == []
    assert not partial.exists()


_UPLOAD = """
import sys
import tempfile
from pathlib import Path
from loradock_adapters.store import LocalStore
writer = LocalStore(Path(sys.argv[1])).writer(sys.argv[2])
writer.write(b"half of it")
writer._file.flush()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def upload(store: LocalStore) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _UPLOAD, str(store.root), SHA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_sweep_after_a_writer_was_killed_removes_its_half(store: LocalStore, upload: subprocess.Popen[str]) -> None:
    assert upload.stdout is not None
    assert upload.stdout.readline() == "written\n"
    assert store.sweep() == 0
    assert len(files_in(store.root / "tmp")) == 1
    os.kill(upload.pid, signal.SIGKILL)
    upload.wait()
    assert store.sweep() == 1
    assert files_in(store.root) == []
    assert not store.has_blob(SHA)


_UPLOAD_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from loradock_adapters.store import LocalStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with LocalStore(Path(sys.argv[1])).writer(sys.argv[2]) as writer:
        for _ in range(10):
            writer.write(bytes(1 << 20))
except OSError as error:
    print(error.errno)
"""


def test_writer_no_room_left_raises_and_leaves_nothing(store: LocalStore) -> None:
    command = [sys.executable, "-c", _UPLOAD_ON_A_FULL_DISK, str(store.root), SHA]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(ran.stdout) == errno.EFBIG
    assert files_in(store.root) == []


_AS_NOBODY = """
import os, sys
from pathlib import Path
from loradock_adapters.manifest import manifest_of
from loradock_adapters.store import LocalStore
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
store = LocalStore(Path(sys.argv[1]) / "store")
manifest = manifest_of(Path(sys.argv[2]))
store.put_directory(Path(sys.argv[2]), manifest)
store.discard_version(manifest.digest)
store.put_directory(Path(sys.argv[2]), manifest)
print(len(os.listdir(store.version_dir(manifest.digest))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="everything here runs without root already")
def test_store_works_without_root() -> None:
    # Not tmp_path: pytest's folders are closed to other users.
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o777)
        source = write_adapter(root / "a")
        source.chmod(0o755)
        command = [sys.executable, "-c", _AS_NOBODY, directory, str(source)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.stdout, ran.stderr) == ("2\n", "")


_PUBLISH_FOR_EVER = """
import sys
import tempfile
from pathlib import Path
from loradock_adapters.manifest import manifest_of
from loradock_adapters.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
source = Path(sys.argv[2])
manifest = manifest_of(source)
print("ready", flush=True)
while True:
    store.put_directory(source, manifest)
    store.discard_version(manifest.digest)
    for sha256 in manifest.blobs:
        store.blob_path(sha256).unlink()
"""


@pytest.mark.parametrize("moment_ms", [1, 3, 7, 13, 29])
def test_killed_at_any_moment_what_is_visible_is_whole(tmp_path: Path, moment_ms: int) -> None:
    source = write_full(tmp_path / "model", shards=3)
    manifest = manifest_of(source)
    root = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-c", _PUBLISH_FOR_EVER, str(root), str(source)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(moment_ms / 1000)
        process.kill()
    store = LocalStore(root)
    for path in files_in(root / "blobs"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    if store.has_version(manifest.digest):
        assert manifest_of(store.version_dir(manifest.digest)) == manifest
    assert list((root / "tmp").iterdir()) == []
    assert manifest_of(store.put_directory(source, manifest)) == manifest
