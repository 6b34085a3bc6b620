"""`/v1/adapters/blobs` over real HTTP: contents that come in pieces, break off, stall, collide, or have no room."""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loradock_adapters import uploads as uploads_module
from loradock_adapters.manifest import manifest_of
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def content(seed: str, size_bytes: int = 300_000) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size_bytes)


def path_of(raw: bytes) -> str:
    return f"/v1/adapters/blobs/{hashlib.sha256(raw).hexdigest()}"


def uploads_in(served: Served) -> list[Path]:
    return [path for path in (served.data_dir / "uploads").rglob("*") if path.is_file()]


def held(served: Served, raw: bytes) -> int:
    """Bytes of a partial on the disk; -1 where there is none."""
    path = served.data_dir / "uploads/anonymous" / f"{hashlib.sha256(raw).hexdigest()}.{len(raw)}"
    return path.stat().st_size if path.exists() else -1


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


async def piece(served: Served, raw: bytes, first: int, end: int, total: int | None = None) -> httpx.Response:
    headers = {"content-range": f"bytes {first}-{end - 1}/{len(raw) if total is None else total}"}
    return await served.client.put(path_of(raw), content=raw[first:end], headers=headers)


async def offset_of(served: Served, raw: bytes) -> str:
    answer = await served.client.head(path_of(raw))
    assert answer.status_code == 404
    return answer.headers["upload-offset"]


async def ask(served: Served, raw: bytes, total: int | None = None) -> httpx.Response:
    headers = {"content-range": f"bytes */{len(raw) if total is None else total}"}
    return await served.client.put(path_of(raw), content=b"", headers=headers)


class Raw:
    """A client that sends what it likes, when it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def put(cls, served: Served, raw: bytes, *headers: str) -> AsyncIterator["Raw"]:
        url = urlsplit(served.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        length = (
            () if any(header.startswith("Content-Length") for header in headers) else (f"Content-Length: {len(raw)}",)
        )
        lines = [f"PUT {path_of(raw)} HTTP/1.1", "Host: localhost", *length, *headers]
        writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def answer(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head + await self.reader.readexactly(length)


async def test_content_in_pieces_becomes_a_blob_with_the_last(shared: Served) -> None:
    raw = content("pieces")
    assert await offset_of(shared, raw) == "0"
    first = await piece(shared, raw, 0, 100_000)
    assert (first.status_code, first.headers["upload-offset"], first.json()["offset_bytes"]) == (202, "100000", 100_000)
    assert await offset_of(shared, raw) == "100000"
    last = await piece(shared, raw, 100_000, len(raw))
    assert (last.status_code, last.json()["stored"]) == (201, True)
    assert (await shared.client.head(path_of(raw))).status_code == 200
    assert held(shared, raw) == -1


@pytest.mark.parametrize("first", [0, 99_999, 100_001])
async def test_piece_at_the_wrong_offset_is_told_the_right_one(shared: Served, first: int) -> None:
    raw = content(f"wrong offset {first}")
    await piece(shared, raw, 0, 100_000)
    answer = await piece(shared, raw, first, first + 1000)
    assert (answer.status_code, answer.headers["upload-offset"]) == (416, "100000")
    assert (error_of(answer)["code"], error_of(answer)["offset_bytes"]) == ("wrong_offset", 100_000)
    assert held(shared, raw) == 100_000


async def test_whole_content_begins_anew_whatever_is_held(shared: Served) -> None:
    raw = content("anew")
    await piece(shared, raw, 0, 1000)
    assert (await shared.client.put(path_of(raw), content=raw)).status_code == 201


async def test_question_tells_the_offset_and_completes_what_is_all_there(shared: Served) -> None:
    raw = content("asked")
    assert (await ask(shared, raw)).headers["upload-offset"] == "0"
    await piece(shared, raw, 0, 1000)
    answer = await ask(shared, raw)
    assert (answer.status_code, answer.headers["upload-offset"]) == (202, "1000")
    partial = shared.data_dir / "uploads/anonymous" / f"{hashlib.sha256(raw).hexdigest()}.{len(raw)}"
    partial.write_bytes(raw)  # as a gateway leaves it that is killed before its last rename
    assert (await ask(shared, raw)).status_code == 201
    assert (await ask(shared, raw)).json()["stored"] is False


@pytest.mark.parametrize(
    "text",
    [
        "bytes 0-1/1",
        "bytes 1-0/5",
        "bytes 0-0",
        "0-0/5",
        "bytes */5x",
        "bytes 0-3/5",
        "bytes -1-0/5",
        "bytes 0-0/*",
        "²",
    ],
)
async def test_content_range_that_cannot_be_is_refused(shared: Served, text: str) -> None:
    headers = [(b"content-range", text.encode("latin-1"))]
    answer = await shared.client.put(path_of(b"range"), content=b"x", headers=headers)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "Content-Range")


async def test_wrong_bytes_after_a_resume_are_forgotten(shared: Served) -> None:
    raw = content("poisoned")
    await shared.client.put(path_of(raw), content=b"x" * 10, headers={"content-range": f"bytes 0-9/{len(raw)}"})
    answer = await piece(shared, raw, 10, len(raw))
    assert (answer.status_code, error_of(answer)["code"]) == (400, "digest_mismatch")
    assert await offset_of(shared, raw) == "0"
    assert (await shared.client.put(path_of(raw), content=raw)).status_code == 201


async def test_upload_that_breaks_off_keeps_what_came_and_goes_on_there(
    shared: Served, caplog: pytest.LogCaptureFixture
) -> None:
    raw = content("cut")
    async with Raw.put(shared, raw) as client:
        await client.send(raw[:70_000])
        await until(lambda: held(shared, raw) == 0, "the partial")  # gathered, not written yet
    await until(lambda: held(shared, raw) == 70_000, "what came")
    assert (await shared.client.get("/v1/adapters")).status_code == 200
    assert (await piece(shared, raw, 70_000, len(raw))).status_code == 201
    assert [record for record in caplog.records if record.exc_info] == []


async def test_second_upload_of_the_same_content_is_asked_to_wait(shared: Served) -> None:
    raw = content("twice at once")
    async with Raw.put(shared, raw) as client:
        await until(lambda: held(shared, raw) == 0, "the first one's lock")
        busy = await shared.client.put(path_of(raw), content=raw)
        assert (busy.status_code, error_of(busy)["code"], busy.headers["retry-after"]) == (423, "upload_busy", "1")
        await client.send(raw)
        assert (await client.answer()).startswith(b"HTTP/1.1 201 ")
    again = await shared.client.put(path_of(raw), content=raw)
    assert (again.status_code, again.json()["stored"]) == (200, False)


async def test_content_that_is_there_is_answered_before_its_bytes(shared: Served) -> None:
    raw = content("there")
    await shared.client.put(path_of(raw), content=raw)
    async with Raw.put(shared, raw) as client:
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")


async def test_full_disk_is_a_507_keeps_what_came_and_recovers(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = content("full")
    await piece(shared, raw, 0, 1000)
    written = uploads_module._write_all

    def full(descriptor: int, chunk: bytes) -> None:
        written(descriptor, chunk[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(uploads_module, "_write_all", full)
        answer = await piece(shared, raw, 1000, len(raw))
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_full")
    assert await offset_of(shared, raw) == "1000"
    assert (await piece(shared, raw, 1000, len(raw))).status_code == 201


async def test_upload_that_the_disk_cannot_hold_is_refused_by_its_header(
    shared: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = content("no room")
    monkeypatch.setattr(uploads_module, "free_bytes", lambda _directory: 1234)
    answer = await piece(shared, raw, 0, 1000, total=5000)
    assert answer.status_code == 507
    assert "5000 bytes are still to come, and 1234 are free" in error_of(answer)["message"]
    assert (await shared.client.head(path_of(raw), headers={"upload-length": "5000"})).status_code == 507
    assert (await ask(shared, raw, 5000)).status_code == 507


async def test_published_contents_count_for_nobody_and_refused_ones_are_dropped(shared: Served, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", seed=11)
    names = {entry.sha256 for entry in manifest_of(directory).files}
    assert (await shared.push(directory, "counted")).status_code == 201
    assert not [path for path in uploads_in(shared) if path.name[:64] in names]
    bad = write_adapter(tmp_path / "b", seed=12, peft_type="IA3")
    before = set((shared.data_dir / "blobs").rglob("*"))
    assert (await shared.push(bad, "uncounted")).status_code == 422
    assert {path for path in (shared.data_dir / "blobs").rglob("*") if path.is_file()} <= before


@pytest.fixture
async def strict(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    """A gateway with small limits and no engine; the parameter: after how long an upload counts as stalled."""
    stall_s: float = getattr(request, "param", 60.0)
    uploads = {"max_unpublished_bytes": 2000, "max_unpublished_files": 3, "max_parallel": 1, "stall_s": stall_s}
    engine = {"url": f"unix://{tmp_path}/nobody"}
    async with serving(tmp_path, monkeypatch, uploads=uploads | {"keep_s": 3600.0}, engine=engine) as running:
        yield running


@pytest.mark.asyncio(loop_scope="function")
async def test_publisher_over_its_limits_is_refused_by_the_header(strict: Served) -> None:
    too_many = await strict.client.put(path_of(b"x" * 2001), content=b"x" * 2001)
    assert (too_many.status_code, error_of(too_many)["code"]) == (413, "upload_quota")
    for name in (b"a", b"b", b"c"):
        assert (await strict.client.put(path_of(name), content=name)).status_code == 201
    answer = await strict.client.put(path_of(b"d"), content=b"d")
    assert (answer.status_code, error_of(answer)["code"]) == (413, "upload_quota")
    assert "3 uploaded files wait to be published, and 3 may" in error_of(answer)["message"]


@pytest.mark.asyncio(loop_scope="function")
async def test_promised_bytes_count_before_they_come(strict: Served) -> None:
    assert (await piece(strict, b"x" * 10, 0, 10, total=1500)).status_code == 202
    answer = await piece(strict, b"y" * 10, 0, 10, total=501)
    assert "501 bytes more beside the 1500 that wait to be published" in error_of(answer)["message"]


@pytest.mark.asyncio(loop_scope="function")
async def test_more_uploads_at_once_than_there_may_be_are_refused(strict: Served) -> None:
    raw = content("first", 1000)
    async with Raw.put(strict, raw) as client:
        await client.send(raw[:400])
        await until(lambda: held(strict, raw) >= 0, "the upload")
        other = await strict.client.put(path_of(b"other"), content=b"other")
        assert (other.status_code, error_of(other)["code"]) == (429, "too_many_uploads")
        assert other.headers["retry-after"] == "1"


@pytest.mark.parametrize("strict", [1.5], indirect=True)
@pytest.mark.asyncio(loop_scope="function")
async def test_upload_that_stalls_ends_keeps_what_came_and_lets_others_in(strict: Served) -> None:
    raw = content("stalls", 1000)
    async with Raw.put(strict, raw) as client:
        await client.send(raw[:400])
        answer = await client.answer()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        assert await client.reader.read() == b""
    assert held(strict, raw) == 400
    assert (await strict.client.put(path_of(b"other"), content=b"other")).status_code == 201


@pytest.mark.parametrize("strict", [1.5], indirect=True)
@pytest.mark.asyncio(loop_scope="function")
async def test_upload_that_trickles_ends_as_well(strict: Served) -> None:
    raw = content("trickles", 1000)
    async with Raw.put(strict, raw) as client:

        async def trickle() -> None:
            for position in range(len(raw)):
                await client.send(raw[position : position + 1])
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        assert (await client.answer()).startswith(b"HTTP/1.1 408 ")
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)
    assert 0 < held(strict, raw) < len(raw)
