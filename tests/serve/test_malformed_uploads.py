"""Malformed uploads over real HTTP: each answered with its own code and place, nothing kept, good traffic untouched."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loradock_adapters.manifest import manifest_of
from loradock_serve.packed_file import SYNCED
from loradock_testing.checkpoints import write_adapter, write_full
from loradock_testing.gateway import Served, serving
from loradock_testing.malformed import DIRECTORIES, Answer, Make
from loradock_testing.malformed_requests import BLOBS, MANIFESTS, NAMES, SHA
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Traffic:
    """Requests for the base and for a published adapter, all the while."""

    served: Served
    digest: str
    right: int = 0

    async def run(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(0.005)

    async def ask(self) -> None:
        assert await self.served.text("good", "a b") == f"{self.digest}:a {self.digest}:b"
        assert await self.served.text("base", "c") == "base:c"
        self.right += 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traffic(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traffic]:
    """A gateway with one good adapter that is in use as long as this file's tests run."""
    root = tmp_path_factory.mktemp("malformed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with serving(root, monkeypatch, base=str(write_full(root / "base")), max_upload_bytes=8 << 30) as served:
            await served.until_ready()
            pushed = await served.push(write_adapter(root / "good"), "good")
            assert pushed.status_code == 201, pushed.text
            packed = served.data_dir / "packed"  # synced a while later, with a file that says so
            await until(lambda: any(packed.glob(f"*/{SYNCED}")), "the packed form on the disk", timeout_s=60)
            running = Traffic(served, pushed.json()["digest"])
            task = asyncio.create_task(running.run())
            yield running
            right = running.right
            await until(lambda: task.done() or running.right > right, "an answer more")
            assert not task.done(), task.exception()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def kept(served: Served) -> tuple[Any, list[str]]:
    """All that an upload could leave behind: names with their versions, and the store's files."""
    names = (await served.client.get("/v1/adapters")).json()["data"]
    told = [(row["name"], row["current_version"], row["digest"]) for row in names]
    folders = ("blobs", "versions", "tmp", "uploads", "packed")
    files = [
        str(path) for folder in folders for path in sorted((served.data_dir / folder).rglob("*")) if path.is_file()
    ]
    return told, files


def place_of(response: httpx.Response) -> Answer:
    """What an answer says of the upload: its first problem, or the error itself."""
    error = response.json()["error"]
    problems = error.get("problems")
    if not problems:
        return Answer(error["code"], error["param"], response.status_code)
    assert all(problem["fix"] and problem["message"] and problem["where"] for problem in problems)
    return Answer(problems[0]["code"], problems[0]["where"], response.status_code)


async def push_blindly(served: Served, directory: Path, name: str) -> httpx.Response:
    """A client that looks at nothing itself: the manifest first, then what the server says is missing."""
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    shas = {name: hashlib.sha256(raw).hexdigest() for name, raw in contents.items()}
    rows = [{"path": n, "size_bytes": len(raw), "sha256": shas[n]} for n, raw in sorted(contents.items())]
    answer = await served.client.post(f"/v1/adapters/{name}/versions", json={"files": rows})
    if answer.status_code != 409:
        return answer
    for sha256 in answer.json()["error"]["missing"]:
        raw = next(raw for name, raw in contents.items() if shas[name] == sha256)
        (await served.client.put(f"/v1/adapters/blobs/{sha256}", content=raw)).raise_for_status()
    return await served.client.post(f"/v1/adapters/{name}/versions", json={"files": rows})


async def test_there_are_sixty_malformed_uploads_and_more_each_of_a_kind_of_its_own() -> None:
    assert len(DIRECTORIES) >= 60
    assert len(DIRECTORIES) + len(MANIFESTS) + len(NAMES) + len(BLOBS) >= 110
    assert len({answer.code for _, answer in DIRECTORIES.values()}) >= 45


@pytest.mark.parametrize(("make", "expected"), DIRECTORIES.values(), ids=DIRECTORIES.keys())
async def test_malformed_checkpoint_is_refused_and_leaves_nothing(
    traffic: Traffic, tmp_path: Path, make: Make, expected: Answer
) -> None:
    make(write_adapter(tmp_path / "bad", seed=3))
    before = await kept(traffic.served)
    answer = await push_blindly(traffic.served, tmp_path / "bad", "bad")
    assert place_of(answer) == expected
    assert await kept(traffic.served) == before
    await traffic.ask()


@pytest.mark.parametrize(("body", "expected"), MANIFESTS.values(), ids=MANIFESTS.keys())
async def test_malformed_manifest_is_refused_and_leaves_nothing(
    traffic: Traffic, body: bytes, expected: Answer
) -> None:
    before = await kept(traffic.served)
    answer = await traffic.served.client.post("/v1/adapters/bad/versions", content=body)
    assert place_of(answer) == expected
    assert await kept(traffic.served) == before
    await traffic.ask()


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
async def test_name_that_is_none_is_refused(traffic: Traffic, name: str, expected: Answer) -> None:
    before = await kept(traffic.served)
    row = {"path": "README.md", "size_bytes": 1, "sha256": SHA}
    answer = await traffic.served.client.post(f"/v1/adapters/{name}/versions", json={"files": [row]})
    assert place_of(answer) == expected
    assert await kept(traffic.served) == before


@pytest.mark.parametrize(("sha256", "headers", "body", "expected"), BLOBS.values(), ids=BLOBS.keys())
async def test_malformed_blob_is_refused_and_leaves_nothing(
    traffic: Traffic, sha256: str, headers: dict[str, str], body: bytes, expected: Answer
) -> None:
    """Over a bare connection: a client's library would not send these."""
    before = await kept(traffic.served)
    url = httpx.URL(traffic.served.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = [f"PUT /v1/adapters/blobs/{sha256} HTTP/1.1", f"host: {url.host}:{url.port}", "connection: close"]
    lines += [f"{key}: {value}" for key, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    raw = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    head, _, text = raw.partition(b"\r\n\r\n")
    answer = httpx.Response(int(head.split()[1]), json=json.loads(text))
    assert place_of(answer) == expected
    assert await kept(traffic.served) == before
    await traffic.ask()


async def test_adapter_that_changes_nothing_is_published_by_force_with_a_remark(
    traffic: Traffic, tmp_path: Path
) -> None:
    make, _ = DIRECTORIES["nothing_changed"]
    make(write_adapter(tmp_path / "idle"))
    served = traffic.served
    assert (await served.push(tmp_path / "idle", "idle")).status_code == 422
    for path in (tmp_path / "idle").iterdir():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        (await served.client.put(f"/v1/adapters/blobs/{sha256}", content=path.read_bytes())).raise_for_status()
    document = {**manifest_of(tmp_path / "idle").to_json(), "force": True}
    published = await served.client.post("/v1/adapters/idle/versions", json=document)
    assert published.status_code == 201, published.text
    assert "changes_nothing" in [reason["code"] for reason in published.json()["reasons"]]
