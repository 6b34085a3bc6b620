"""`/v1/adapters` over real HTTP: blobs, publishing, listing, rolling back, removing."""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loradock_adapters.manifest import manifest_of
from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter, write_full_model
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTENT = b"some bytes " * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


def blob(content: bytes) -> str:
    return f"/v1/adapters/blobs/{hashlib.sha256(content).hexdigest()}"


def temporaries(shared: Served) -> list[Path]:
    return list((shared.data_dir / "tmp").iterdir())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


# Blobs


async def test_blob_is_stored_once(shared: Served) -> None:
    path = blob(b"once")
    assert (await shared.client.head(path)).status_code == 404
    first = await shared.client.put(path, content=b"once")
    assert (first.status_code, first.json()["stored"]) == (201, True)
    assert (await shared.client.head(path)).status_code == 200
    again = await shared.client.put(path, content=b"once")
    assert (again.status_code, again.json()["stored"]) == (200, False)


async def test_blob_of_other_bytes_than_announced_is_refused_and_not_stored(shared: Served) -> None:
    path = blob(b"these")
    answer = await shared.client.put(path, content=b"those")
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "digest_mismatch"
    assert "the bytes have the sha256" in error_of(answer)["message"]
    assert (await shared.client.head(path)).status_code == 404
    assert temporaries(shared) == []


@pytest.mark.parametrize("name", ["abc", "A" * 64, "..", "x" * 64])
async def test_blob_name_that_is_no_sha256_is_refused(shared: Served, name: str) -> None:
    answer = await shared.client.put(f"/v1/adapters/blobs/{name}x", content=b"x")
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "A blob is named by the 64 lower-case hex digits of its sha256"


async def test_upload_without_a_length_is_refused(shared: Served) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"unknown"

    answer = await shared.client.put(blob(b"unknown"), content=pieces())
    assert answer.status_code == 411
    assert error_of(answer)["message"] == "An upload needs a Content-Length header"


async def test_upload_over_the_limit_is_refused_by_its_header(shared: Served) -> None:
    head = f"PUT {blob(b'big')} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**60}\r\n\r\n"
    answer = await raw(shared, head.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"over this server's limit of 274877906944 (`max_upload_bytes`)" in answer


async def test_client_that_expects_a_continue_gets_one_or_its_refusal(shared: Served) -> None:
    content = b"expected"
    head = f"PUT {blob(content)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\nExpect: 100-continue\r\n\r\n"
    reader, writer = await connect(shared)
    writer.write(head.encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(content)
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 201 ")
    writer.close()
    await writer.wait_closed()
    assert (await raw(shared, head.encode())).startswith(b"HTTP/1.1 200 ")  # there already: nothing to send


async def connect(shared: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = urlsplit(shared.url)
    return await asyncio.open_connection(url.hostname, url.port, family=socket.AF_INET)


async def raw(shared: Served, request: bytes) -> bytes:
    """What comes back for a head, without the body that it announces."""
    reader, writer = await connect(shared)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return head + body


# Publishing


async def test_new_version_is_created_and_the_same_bytes_again_are_not(
    shared: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="loradock.publish")
    directory = write_adapter(tmp_path / "a", seed=1)
    first = await shared.push(directory, "twice")
    assert first.status_code == 201
    assert first.json() == {
        "name": "twice",
        "version": 1,
        "digest": manifest_of(directory).digest,
        "kind": "lora",
        "placement": "shared",
        "reasons": first.json()["reasons"],
        "created": True,
        "current_version": 1,
        "split": None,
        "state": "ready",
        "repairs": [],
        "source": None,
        "proof": first.json()["proof"],
    }
    (line,) = [record.getMessage() for record in caplog.records if record.name == "loradock.publish"]
    assert line == f"published twice@1 (shared, {first.json()['digest']})"
    caplog.clear()
    again = await shared.push(directory, "twice")
    assert [record for record in caplog.records if record.name == "loradock.publish"] == []
    assert (again.status_code, again.json()["version"], again.json()["created"]) == (200, 1, False)


async def test_missing_blobs_are_named(shared: Served, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path / "a", seed=2, rank=3))
    answer = await shared.client.post("/v1/adapters/absent/versions", json=manifest.to_json())
    assert answer.status_code == 409
    assert error_of(answer)["code"] == "missing_blobs"
    assert sorted(error_of(answer)["missing"]) == sorted(manifest.blobs)
    assert answer.headers["x-should-retry"] == "false"
    assert (await shared.client.get("/v1/adapters/absent")).status_code == 404


async def test_checkpoint_that_the_gate_refuses_is_visible_nowhere(shared: Served, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", seed=3, peft_type="IA3")
    answer = await shared.push(directory, "refused")
    assert answer.status_code == 422
    problems = error_of(answer)["problems"]
    assert problems
    assert set(problems[0]) == {"code", "message", "where", "fix"}
    assert (await shared.client.get("/v1/adapters/refused")).status_code == 404
    assert not shared.version_dir(manifest_of(directory).digest).exists()
    assert (await shared.complete("refused", "x")).status_code == 404


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("UPPER", b'{"files": []}', 400, "invalid_name"),
        ("base", b'{"files": []}', 400, "invalid_name"),
        ("tiny-base", b'{"files": []}', 409, "conflict"),
        ("fine", b"{", 400, "invalid_json"),
        ("fine", b"[]", 400, "invalid_json"),
        ("fine", b"{}", 400, "invalid_manifest"),
        ("fine", b" " * (2**20 + 1), 413, "too_large"),
    ],
)
async def test_publish_that_cannot_be_is_refused(
    shared: Served, name: str, body: bytes, status: int, code: str
) -> None:
    answer = await shared.client.post(f"/v1/adapters/{name}/versions", content=body)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


# Names


async def test_names_are_listed_shown_rolled_back_and_removed(shared: Served, tmp_path: Path) -> None:
    one = (await shared.push(write_adapter(tmp_path / "1", seed=4), "life")).json()["digest"]
    two = (await shared.push(write_adapter(tmp_path / "2", seed=5), "life")).json()["digest"]
    listed = (await shared.client.get("/v1/adapters")).json()
    (entry,) = [entry for entry in listed["data"] if entry["name"] == "life"]
    assert listed["object"] == "list"
    assert (entry["current_version"], entry["digest"], entry["state"]) == (2, two, "loaded")
    shown = (await shared.client.get("/v1/adapters/life")).json()
    assert [(v["version"], v["digest"], v["current"]) for v in shown["versions"]] == [(2, two, True), (1, one, False)]
    assert (shown["rank"], shown["own_chat_template"], shown["stop_token_ids"]) == (4, False, [])

    back = await shared.client.post("/v1/adapters/life/rollback", json={"version": 1})
    assert (back.status_code, back.json()["current_version"], back.json()["digest"]) == (200, 1, one)
    assert await shared.text("life", "x") == f"{one}:x"
    assert await shared.text("life@2", "x") == f"{two}:x"
    assert await shared.text(f"life@{two}", "x") == f"{two}:x"

    removed = await shared.client.delete("/v1/adapters/life")
    assert removed.json() == {"name": "life", "versions": 2, "deleted": True}
    assert (await shared.complete("life@2", "x")).status_code == 404

    async def is_unloaded() -> bool:
        return not {one, two} & set((await shared.seen())["adapters"])

    await until(is_unloaded, "the engine letting go")


async def test_version_numbers_are_never_given_out_twice(shared: Served, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "1", seed=6)
    await shared.push(directory, "reborn")
    await shared.client.delete("/v1/adapters/reborn")
    assert (await shared.push(directory, "reborn")).json()["version"] == 2
    assert await shared.text("reborn", "x") == f"{manifest_of(directory).digest}:x"


@pytest.mark.parametrize("body", [{"version": "1"}, {"version": True}, {"version": 1.5}])
async def test_rollback_to_what_is_no_number_is_told_how(shared: Served, body: Any) -> None:
    answer = await shared.client.post("/v1/adapters/life/rollback", json=body)
    assert answer.status_code == 400
    assert error_of(answer)["message"] == 'Say which version: {"version": 2}, or nothing for the one before'


async def test_names_and_versions_that_are_not_there_are_404(shared: Served, tmp_path: Path) -> None:
    await shared.push(write_adapter(tmp_path / "1", seed=7), "alone")
    answers = [
        await shared.client.post("/v1/adapters/alone/rollback", json={"version": 9}),
        await shared.client.get("/v1/adapters/nobody"),
        await shared.client.delete("/v1/adapters/nobody"),
    ]
    assert [answer.status_code for answer in answers] == [404] * 3
    assert error_of(answers[0])["message"] == "there is no version 9 of alone"
    assert error_of(answers[1])["message"] == "there is no model nobody"


async def test_full_model_is_placed_on_its_own_and_says_why_it_waits(shared: Served, tmp_path: Path) -> None:
    pushed = (await shared.push(write_full_model(tmp_path / "f", seed=8), "heavy")).json()
    assert (pushed["kind"], pushed["placement"], pushed["state"]) == ("full", "dedicated", "unproven")
    assert (await shared.client.get("/v1/adapters/heavy")).json()["state"] == "stopped"


async def test_rollback_under_load_answers_every_request_with_one_of_the_two(shared: Served, tmp_path: Path) -> None:
    digests = [
        (await shared.push(write_adapter(tmp_path / str(seed), seed=seed), "moving")).json()["digest"]
        for seed in (20, 21)
    ]
    answers: list[str] = []
    done = asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            answers.append(await shared.text("moving", "x"))

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for number in (1, 2, 1, 2, 1):
        before = len(answers)
        back = await shared.client.post("/v1/adapters/moving/rollback", json={"version": number})
        assert back.json()["digest"] == digests[number - 1]
        assert await shared.text("moving", "x") == f"{digests[number - 1]}:x"  # from the answer on: the new one
        await until(lambda before=before: len(answers) >= before + 8, "traffic")  # type: ignore[misc]
    done.set()
    await asyncio.gather(*clients)
    assert set(answers) == {f"{digest}:x" for digest in digests}


async def test_listing_is_plain_json(shared: Served) -> None:
    answer = await shared.client.get("/v1/adapters")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content)["object"] == "list"


async def test_refused_push_and_failing_route_leave_one_line_each(
    shared: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_adapter(tmp_path / "a", peft_type="IA3", alora_invocation_tokens=[1])
    assert (await shared.push(directory, "refused-and-logged")).status_code == 422
    await shared.client.delete("/v1/adapters/never-there")
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        "POST /v1/adapters/refused-and-logged/versions 422 refused (peft_type, alora, base_name), from 127.0.0.1",
        "DELETE /v1/adapters/never-there 404 not_found, from 127.0.0.1",
    ]
