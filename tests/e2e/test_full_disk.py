"""A real gateway on a small file system that fills up: 507, nothing is lost, and it goes on when there is room.

The file system is a tmpfs in a user namespace (`loradock_testing/needs.py` says what happens where that cannot be had).
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from loradock_adapters.client import Client
from loradock_adapters.errors import ServerError
from loradock_adapters.manifest import manifest_of
from loradock_testing.loradock_server import LoradockServer, loradock_server
from loradock_testing.quick_gateway import SmallDisk, fake_engine, small_disk
from loradock_testing.tiny_checkpoints import write_adapter, write_base

DISK_BYTES = 24_000_000
CARD_BYTES = 6_000_000


@dataclass(frozen=True)
class World:
    disk: SmallDisk
    server: LoradockServer
    root: Path

    def checkpoint(self, seed: int, card_bytes: int = CARD_BYTES) -> Path:
        directory = write_adapter(self.root / f"adapter-{seed}", seed=seed)
        (directory / "README.md").write_text(random.Random(seed).randbytes(card_bytes // 2).hex())
        return directory

    def push(self, directory: Path, name: str = "model") -> tuple[int, int]:
        """The version, and the bytes that were sent for it."""
        with Client(self.server.url, retry_waits_s=(0.1, 0.1)) as client:
            answer = client.push(directory, name)
        return answer["version"], answer["sent_bytes"]

    def answer(self, model: str) -> str:
        body = {"model": model, "prompt": "x"}
        answer = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"]).removesuffix(":x")


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """With room, before and after."""
    yield shared
    shared.disk.empty()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("full")
    base = write_base(root / "base")
    with (
        small_disk(root / "disk", DISK_BYTES) as disk,
        fake_engine(root, disk.prefix) as url,
        loradock_server(
            base, root / "run", prefix=disk.prefix, data_elsewhere=disk.path / "data", engine={"url": url}
        ) as server,
    ):
        yield World(disk, server, root)


def test_upload_that_the_disk_cannot_hold_is_refused_by_its_header_and_goes_through_later(world: World) -> None:
    kept = world.checkpoint(1, card_bytes=1000)
    assert world.push(kept)[0] == 1
    world.disk.fill(leave_bytes=3_000_000)
    directory = world.checkpoint(2)
    with pytest.raises(
        ServerError, match=r"6000000 bytes are still to come, and \d+ are free.*again: \d+ of"
    ) as caught:
        world.push(directory)
    assert (caught.value.status, caught.value.code) == (507, "storage_full")
    assert world.answer("model") == manifest_of(kept).digest
    world.disk.empty()
    assert world.push(directory)[0] == 2
    assert world.answer("model") == manifest_of(directory).digest


def test_disk_that_fills_up_during_an_upload_keeps_what_came(world: World) -> None:
    directory = world.checkpoint(3)
    (card,) = [entry for entry in manifest_of(directory).files if entry.path == "README.md"]
    content = (directory / "README.md").read_bytes()
    path = f"/v1/adapters/blobs/{card.sha256}"
    with closing(HTTPConnection(urlsplit(world.server.url).netloc, timeout=60)) as connection:
        connection.putrequest("PUT", path)
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content[:4_000_000])
        partial = world.disk.root / "data/uploads/anonymous" / f"{card.sha256}.{len(content)}"
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline, "nothing of it was written"
            time.sleep(0.01)
        world.disk.fill()
        connection.send(content[4_000_000:])
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (507, "storage_full")
    held_bytes = int(httpx.head(f"{world.server.url}{path}").headers["upload-offset"])
    assert 0 < held_bytes < len(content)
    assert hashlib.sha256(partial.read_bytes()).digest() == hashlib.sha256(content[:held_bytes]).digest()
    world.disk.empty()
    version, sent_bytes = world.push(directory)
    # Its config may be there already, from an adapter before.
    assert card.size_bytes <= sent_bytes + held_bytes <= manifest_of(directory).size_bytes
    assert world.answer("model") == manifest_of(directory).digest
    assert world.answer(f"model@{version}") == manifest_of(directory).digest


def test_disk_without_a_byte_refuses_what_it_cannot_write_and_serves_on(world: World) -> None:
    directory = world.checkpoint(4, card_bytes=1000)
    manifest = manifest_of(directory)
    for entry in manifest.files:
        content = (directory / entry.path).read_bytes()
        httpx.put(
            f"{world.server.url}/v1/adapters/blobs/{entry.sha256}", content=content, timeout=60
        ).raise_for_status()
    before = httpx.get(f"{world.server.url}/v1/adapters/model", timeout=60).json()
    world.disk.fill()
    published = httpx.post(f"{world.server.url}/v1/adapters/model/versions", json=manifest.to_json(), timeout=60)
    rolled = [
        httpx.post(f"{world.server.url}/v1/adapters/model/rollback", json={"version": 1 + number % 2}, timeout=60)
        for number in range(20)
    ]
    new = httpx.put(
        f"{world.server.url}/v1/adapters/blobs/{hashlib.sha256(b'x').hexdigest()}", content=b"x", timeout=60
    )
    assert [published.status_code, new.status_code] == [507, 507], (published.text, new.text)
    assert {answer.status_code for answer in rolled} <= {200, 507}, [answer.text for answer in rolled]
    assert 507 in {answer.status_code for answer in rolled}
    assert {answer.json()["error"]["code"] for answer in (published, new)} == {"storage_full"}
    assert world.answer("model@1")
    world.disk.empty()
    assert len(httpx.get(f"{world.server.url}/v1/adapters/model", timeout=60).json()["versions"]) == len(
        before["versions"]
    )
    assert world.push(directory) == (len(before["versions"]) + 1, 0)
    assert world.answer("model") == manifest.digest
