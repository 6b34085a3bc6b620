"""Publishing when something is in the way: another publish, an engine that refuses, is down, or dies; a kill."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from loradock_adapters.manifest import manifest_of
from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_serve import engine as engine_module
from loradock_serve.engine import AttachedEngine, Engine
from loradock_serve.publish import Publisher
from loradock_serve.turns import Turns
from loradock_testing.engines import SUPPORT, group_members
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until


async def visible(served: Served) -> list[str]:
    return [entry["name"] for entry in (await served.client.get("/v1/adapters")).json()["data"]]


async def test_engine_that_refuses_leaves_no_version_and_passes_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE_REFUSES", "1")
    directory = write_adapter(tmp_path / "a")
    async with serving(tmp_path, monkeypatch) as served:
        await served.until_ready()
        answer = await served.push(directory, "refused")
        assert answer.status_code == 422
        (problem,) = answer.json()["error"]["problems"]
        assert problem["code"] == "engine_refused"
        assert "rank 99 is greater than max_lora_rank 64" in problem["message"]
        assert "please report" in problem["fix"]
        assert await visible(served) == []
        assert not served.version_dir(manifest_of(directory).digest).exists()


async def test_engine_that_is_not_up_yet_leaves_the_version_unproven_and_served_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = asyncio.Event()
    live = Engine._live

    async def later(self: Engine) -> None:
        await may_start.wait()
        await live(self)

    monkeypatch.setattr(Engine, "_live", later)
    async with serving(tmp_path, monkeypatch) as served:
        answer = await served.push(write_adapter(tmp_path / "a"), "early")
        assert (answer.status_code, answer.json()["state"]) == (201, "unproven")
        assert (await served.client.get("/v1/adapters/early")).json()["state"] == "stored"
        may_start.set()
        assert await served.text("early", "x") == f"{answer.json()['digest']}:x"
        assert (await served.client.get("/v1/adapters/early")).json()["state"] == "loaded"


async def test_engine_that_dies_during_the_proof_does_not_hinder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 600.0)  # its next start would prove it
    async with serving(tmp_path, monkeypatch) as served:
        start = await served.gateway.fleet.base.ensure_ready(30)
        await start.client._pool.close(0)
        answer = await served.push(write_adapter(tmp_path / "a"), "unproven")
        assert (answer.status_code, answer.json()["state"]) == (201, "unproven")


async def test_attached_engine_without_our_plug_in_takes_no_adapters_and_keeps_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = await served.gateway.fleet.base.ensure_ready(30)
    monkeypatch.setattr(served.gateway.fleet, "base", attached := AttachedEngine("unix:///nowhere"))
    monkeypatch.setattr(attached, "_current", type(base)(1, base.client, None))
    directory = write_adapter(tmp_path / "a")
    answer = await served.push(directory, "refused")
    assert answer.status_code == 409
    assert "runs without Loradock's plug-in" in answer.json()["error"]["message"]
    assert await visible(served) == []
    assert not served.version_dir(manifest_of(directory).digest).exists()
    monkeypatch.undo()
    await attached.stop()


async def test_full_disk_in_the_registry_is_a_507_and_keeps_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        cause = sqlite3.OperationalError("database or disk is full")
        cause.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise sa.exc.OperationalError("INSERT", {}, cause)

    monkeypatch.setattr(Registry, "publish", full)
    directory = write_adapter(tmp_path / "a")
    answer = await served.push(directory, "full")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
    assert await visible(served) == []
    assert not served.version_dir(manifest_of(directory).digest).exists()


async def test_publish_that_is_cancelled_while_it_is_registered_keeps_its_files(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    publishing: list[asyncio.Task[Any] | None] = []
    register, publish = Registry.publish, Publisher.publish

    def slowly(self: Registry, *parts: Any) -> Any:
        has_begun.set()
        may_go_on.wait(10)
        return register(self, *parts)

    async def watched(self: Publisher, *parts: Any) -> Any:
        publishing.append(asyncio.current_task())
        return await publish(self, *parts)

    monkeypatch.setattr(Registry, "publish", slowly)
    monkeypatch.setattr(Publisher, "publish", watched)
    directory = write_adapter(tmp_path / "a")
    pushing = asyncio.create_task(served.push(directory, "cut"))
    await asyncio.to_thread(has_begun.wait, 10)
    (task,) = publishing
    assert task is not None
    task.cancel()  # as a server that stops does
    await asyncio.wait([task], timeout=0.3)
    may_go_on.set()
    await asyncio.wait([task])
    pushing.cancel()
    await until(lambda: "cut" in {version.name for version in served.gateway.registry.models()}, "the version")
    assert served.version_dir(manifest_of(directory).digest).is_dir()


async def test_refusal_leaves_the_files_that_requests_of_a_removed_name_still_run_on(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_adapter(tmp_path / "a")
    digest = (await served.push(directory, "first")).json()["digest"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Registry, "publish", full)
    with served.gateway.fleet.answering(served.gateway.registry.resolve("first")):
        await served.client.delete("/v1/adapters/first")
        assert (await served.push(directory, "second")).status_code == 507
        assert served.version_dir(digest).is_dir(), "an engine that has to read it anew would die"
    assert (await served.push(directory, "second")).status_code == 507
    assert not served.version_dir(digest).exists()


async def test_push_into_a_store_that_does_not_answer_holds_up_nothing_else(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    is_asked, may_go_on = threading.Event(), threading.Event()

    def silent(*_: Any) -> None:
        is_asked.set()
        may_go_on.wait(60)

    monkeypatch.setattr(LocalStore, "secure", silent)
    pushing = asyncio.create_task(served.push(write_adapter(tmp_path / "a"), "slow"))
    try:
        await until(is_asked.is_set, "the push at the store")
        async with asyncio.timeout(30):
            assert await visible(served) == []
    finally:
        may_go_on.set()
    assert (await pushing).status_code == 201


async def test_refusal_does_not_take_away_what_another_name_uses(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_adapter(tmp_path / "a")
    digest = (await served.push(directory, "first")).json()["digest"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "publish", full)
        assert (await served.push(directory, "second")).status_code == 507
    assert served.version_dir(digest).is_dir()
    assert await served.text("first", "x") == f"{digest}:x"


async def test_publishes_of_one_name_at_once_get_numbers_of_their_own(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    directories = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(5)]
    answers = await asyncio.gather(*(served.push(directory, "crowd") for directory in directories))
    assert sorted(answer.json()["version"] for answer in answers) == [1, 2, 3, 4, 5]
    current = (await served.client.get("/v1/adapters/crowd")).json()
    (last,) = [answer.json() for answer in answers if answer.json()["version"] == 5]
    assert current["digest"] == last["digest"]


async def test_same_bytes_under_many_names_at_once_are_loaded_once(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    directory = write_adapter(tmp_path / "a")
    answers = await asyncio.gather(*(served.push(directory, f"name-{number}") for number in range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert list((await served.seen())["adapters"]) == [manifest_of(directory).digest]
    await served.client.delete("/v1/adapters/name-0")
    assert await served.text("name-1", "x") == f"{manifest_of(directory).digest}:x"


async def test_turns_of_one_key_never_overlap_and_leave_nothing() -> None:
    turns = Turns()
    inside = 0
    order: list[int] = []

    async def take(number: int) -> None:
        nonlocal inside
        async with turns.of("key"):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            order.append(number)
            inside -= 1

    tasks = [asyncio.create_task(take(number)) for number in range(6)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 3, 4, 5]
    assert turns._locks == {}


# What a publish does on disk, again and again, in a process of its own that can be killed.
PUBLISHING = """
import asyncio, sys
from pathlib import Path
import pytest
from loradock_testing.gateway import serving
from loradock_testing.tiny_checkpoints import write_adapter

async def main(root):
    with pytest.MonkeyPatch.context() as patch:
        async with serving(root, patch) as served:
            await served.until_ready()
            print(served.gateway.fleet.base.pid, flush=True)
            for seed in range(10_000):
                answer = await served.push(write_adapter(root / "w" / str(seed), seed=seed), f"name-{seed % 3}")
                print(answer.json()["digest"], flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_gateway_killed_while_it_publishes_leaves_old_or_new_and_no_engine(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(PUBLISHING), str(tmp_path)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
    )
    assert process.stdout is not None
    group = int(await process.stdout.readline())
    told = [(await process.stdout.readline()).decode().strip() for _ in range(4)]
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    await until(lambda: group_members(group) == [], "the engine's end")
    data = tmp_path / "data"
    store, registry = LocalStore(data), Registry(f"sqlite:///{data / 'registry.sqlite'}")
    try:
        assert set(told) <= registry.digests()  # what was answered is there
        for version in registry.models():
            for entry in registry.manifest(version).files:  # and what is there is whole
                assert (store.version_dir(version.digest) / entry.path).stat().st_size == entry.size_bytes
        assert list((data / "tmp").iterdir()) == []
        assert list((data / "versions").glob(".partial*")) == []
    finally:
        registry.close()
