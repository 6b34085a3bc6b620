"""`loradock gc` against a running gateway: what was removed goes, what is in use stays until it is not."""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loradock_adapters.cli import run
from loradock_serve.engine_client import EngineClient
from loradock_serve.errors import EngineUnavailableError
from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def command(shared: Served, *words: str) -> int:
    return await asyncio.to_thread(run, [*words, "--server", shared.url])


async def push(shared: Served, tmp_path: Path, name: str) -> str:
    answer = await shared.push(write_adapter(tmp_path / name, seed=zlib.crc32(name.encode())), name)
    assert answer.status_code == 201
    return str(answer.json()["digest"])


async def test_removed_model_is_freed_and_the_engine_has_let_go_of_it(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, kept = await push(shared, tmp_path, "gone"), await push(shared, tmp_path, "kept")
    for name in ("gone", "kept"):
        await shared.text(name, "x")
    size_bytes = sum(
        path.stat().st_size for path in shared.version_dir(gone).iterdir() if path.suffix == ".safetensors"
    )
    assert await command(shared, "rm", "gone") == 0
    await until(lambda: shared.gateway.fleet.use_of(gone) is None, "the engine letting go")
    assert await command(shared, "gc", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("would free ")
    assert shared.version_dir(gone).is_dir()
    assert await command(shared, "gc") == 0
    assert capsys.readouterr().out.startswith("freed ")
    assert not shared.version_dir(gone).exists()
    assert gone not in (await shared.seen())["adapters"]
    assert not list((shared.data_dir / "packed").glob(f"{gone.removeprefix('sha256:')}*"))
    assert shared.version_dir(kept).is_dir()
    assert await shared.text("kept", "x") == f"{kept}:x"
    again = await shared.client.post("/v1/adapters/gc")
    assert again.json() | {"kept": []} == {
        "dry_run": False,
        "freed_bytes": 0,
        "versions": 0,
        "copies": 0,
        "contents": 0,
        "digests": [],
        "kept": [],
    }
    assert size_bytes > 0
    assert await push(shared, tmp_path, "gone") == gone, "the same files can come again"
    assert await shared.text("gone", "x") == f"{gone}:x"


async def test_version_that_answers_a_request_stays_until_the_answer_is_whole(shared: Served, tmp_path: Path) -> None:
    digest = await push(shared, tmp_path, "busy")
    async with waiting(shared, "busy"):
        await until(lambda: shared.gateway.fleet.use_of(digest) is not None, "the request")
        assert (await shared.client.delete("/v1/adapters/busy")).status_code == 200
        report = (await shared.client.post("/v1/adapters/gc")).json()
        assert {"digest": digest, "why": "requests are answered with it"} in report["kept"]
        assert shared.version_dir(digest).is_dir()
    await until(lambda: shared.gateway.fleet.use_of(digest) is None, "the end of the request")
    report = (await shared.client.post("/v1/adapters/gc")).json()
    assert digest in report["digests"]
    assert not shared.version_dir(digest).exists()


@contextlib.asynccontextmanager
async def waiting(shared: Served, model: str) -> AsyncIterator[None]:
    """A request that the engine does not answer, hung up on at the end of the block."""
    task = asyncio.create_task(shared.complete(model, "!wait"))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_gc_that_is_asked_for_wrongly_refused(shared: Served) -> None:
    answer = await shared.client.post("/v1/adapters/gc", json={"dry_run": "yes"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "`dry_run` is true or false")


async def test_removals_and_collections_under_load_fail_no_other_request(shared: Served, tmp_path: Path) -> None:
    """Versions come and go and are collected at once, while their name and another one answer."""
    names = ["steady", "turning"]
    for name in names:
        await push(shared, tmp_path, name)
    wrong: list[str] = []
    answered = 0
    done = asyncio.Event()

    async def client(name: str) -> None:
        nonlocal answered
        while not done.is_set():
            answer = await shared.complete(name, "x")
            answered += 1
            if answer.status_code != 200:
                wrong.append(answer.text)

    clients = [asyncio.create_task(client(name)) for name in names * 2]
    for turn in range(4):
        version = (await shared.client.get("/v1/adapters/turning")).json()["current_version"]
        fresh = await shared.push(write_adapter(tmp_path / f"t{turn}", seed=900 + turn), "turning")
        assert fresh.status_code == 201
        before = answered
        await until(lambda before=before: answered >= before + 8, "traffic")  # type: ignore[misc]
        assert (await shared.client.delete(f"/v1/adapters/turning/versions/{version}")).status_code == 200
        assert (await shared.client.post("/v1/adapters/gc")).status_code == 200
    done.set()
    await asyncio.gather(*clients)
    assert wrong == []
    assert len(list((shared.data_dir / "versions").glob("[0-9a-f]*"))) <= 5


async def test_engine_that_does_not_say_what_it_has_keeps_everything(
    shared: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await push(shared, tmp_path, "unknown")
    await shared.client.delete("/v1/adapters/unknown")
    await until(lambda: shared.gateway.fleet.use_of(digest) is None, "the engine letting go")

    async def silent(_client: EngineClient) -> None:
        raise EngineUnavailableError("it does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(EngineClient, "status", silent)
        report = (await shared.client.post("/v1/adapters/gc")).json()
    assert {"digest": digest, "why": "the base's engine does not say what it has loaded"} in report["kept"]
    assert shared.version_dir(digest).is_dir()
    assert digest in (await shared.client.post("/v1/adapters/gc")).json()["digests"]
