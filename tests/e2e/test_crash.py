"""`kill -9` of each process of the engine in turn, under load, with a real vLLM: nothing hangs, nothing is lost."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from loradock_testing.engine_look import EngineLook
from loradock_testing.loradock_server import LoradockServer, children, engine_socket, group_processes, loradock_server
from loradock_testing.tiny_models import make_adapter, make_llama
from loradock_testing.waiting import until

pytestmark = pytest.mark.engine

PROMPT = "def main():"
STREAMS, WHOLES = 6, 4


@dataclass
class Seen:
    """What the clients of one kill saw."""

    streams: list[str] = field(default_factory=list)
    wholes: list[httpx.Response] = field(default_factory=list)
    after: httpx.Response | None = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoradockServer]:
    root = tmp_path_factory.mktemp("crash")
    base = make_llama(root / "base", max_positions=32768)
    with loradock_server(
        base, root / "data", engine={"dtype": "float32", "max_loras": 2, "kv_cache_gib": 1}
    ) as running:
        for seed in (1, 2):
            running.loradock("push", str(make_adapter(root / f"a{seed}", base, seed)), f"adapter-{seed}")
        yield running


@pytest.mark.parametrize("victim", ["api_server", "EngineCore", "Worker", "launcher.py"])
def test_engine_process_killed_under_load_is_survived(server: LoradockServer, victim: str) -> None:
    before = {model: server.tokens(model, PROMPT, 12) for model in ("base", "adapter-1", "adapter-2")}
    (launcher,) = children(server.pid)
    pid = next(pid for pid, title in group_processes(launcher).items() if victim in title and _is(victim, title))
    memory = _shared_memory(launcher)
    assert memory

    seen = asyncio.run(_load_and_kill(server, pid))

    for text in seen.streams:
        events = [event for event in text.split("\n\n") if event]
        assert '"error"' in events[-1], text[-300:]
        assert "[DONE]" not in text
    for answer in seen.wholes:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) > 0
    assert seen.after is not None
    assert seen.after.status_code in (200, 503), seen.after.text

    server.wait_healthy()
    assert {model: server.tokens(model, PROMPT, 12) for model in before} == before
    assert group_processes(launcher) == {}
    (new_launcher,) = children(server.pid)  # and no zombie beside it
    assert new_launcher != launcher
    socket = engine_socket(server)
    assert set(socket.parent.iterdir()) == {socket, socket.with_suffix("")}, "those of the engine before are gone"
    assert list(socket.with_suffix("").iterdir()), "its processes talk to each other there"
    assert [path for path in memory if path.exists()] == []


def _shared_memory(launcher: int) -> set[Path]:
    """What an engine's processes share in /dev/shm, as far as it has a name there."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in group_processes(launcher))
    return {path for path in map(Path, re.findall(r"/dev/shm/psm_\w+", maps)) if path.exists()}


def _is(victim: str, title: str) -> bool:
    # The launcher's own command line names the API server too.
    return victim == "launcher.py" or "launcher.py" not in title


async def _load_and_kill(server: LoradockServer, pid: int) -> Seen:
    """Streams and whole requests in flight, then the kill, then one request more."""
    seen = Seen()
    running = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        async with asyncio.TaskGroup() as group:
            for i in range(STREAMS):
                group.create_task(_stream(client, f"adapter-{1 + i % 2}", seen, running))
            await running.wait()
            for i in range(WHOLES):
                group.create_task(_whole(client, ("base", "adapter-1")[i % 2], seen))
            # One that came after the kill would be held for the next engine, and then run for minutes.
            await until(lambda: _all_admitted(client), "every request has its turn on the engine", 60)
            await until(lambda: _all_in_engine(server), "every request is in the engine", 60)
            os.kill(pid, signal.SIGKILL)
        seen.after = await client.post(
            "/v1/completions", json={"model": "adapter-1", "prompt": PROMPT, "max_tokens": 1}
        )
    return seen


async def _all_admitted(client: httpx.AsyncClient) -> bool:
    """Whether the gateway has handed every request to the base's engine."""
    found = re.search(r'^loradock_queue_admitted\{engine="base"\} (\S+)', (await client.get("/metrics")).text, re.M)
    assert found is not None
    return float(found[1]) == STREAMS + WHOLES


async def _all_in_engine(server: LoradockServer) -> bool:
    """Whether the engine has them all: between the gateway and its engine lies a socket."""
    look = await asyncio.to_thread(EngineLook, server)
    return look.metric("num_requests_running") + look.metric("num_requests_waiting") == STREAMS + WHOLES


def _body(model: str, **fields: object) -> dict[str, object]:
    # Minutes of tokens: on a starved machine the kill may come late, and must still find every request running.
    return {"model": model, "prompt": PROMPT, "max_tokens": 30000, "ignore_eos": True, "temperature": 0, **fields}


async def _stream(client: httpx.AsyncClient, model: str, seen: Seen, running: asyncio.Event) -> None:
    parts: list[str] = []
    async with client.stream("POST", "/v1/completions", json=_body(model, stream=True)) as answer:
        async for part in answer.aiter_text():
            parts.append(part)
            running.set()
    seen.streams.append("".join(parts))


async def _whole(client: httpx.AsyncClient, model: str, seen: Seen) -> None:
    seen.wholes.append(await client.post("/v1/completions", json=_body(model)))


def test_gateway_killed_leaves_no_engine_and_loses_nothing(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    engine = {"dtype": "float32", "max_loras": 2, "kv_cache_gib": 1}
    with loradock_server(base, tmp_path / "data", engine=engine) as first:
        first.loradock("push", str(make_adapter(tmp_path / "a", base, 1)), "kept")
        tokens = first.tokens("kept", PROMPT, 12)
        (launcher,) = children(first.pid)
        memory, sockets = _shared_memory(launcher), engine_socket(first).parent
        os.kill(first.pid, signal.SIGKILL)
        _until_gone(launcher)
        assert [path for path in (*memory, sockets) if path.exists()] == []
    with loradock_server(base, tmp_path / "data", engine=engine) as second:
        assert second.tokens("kept", PROMPT, 12) == tokens
        (launcher,) = children(second.pid)
        memory, sockets = _shared_memory(launcher), engine_socket(second).parent
    assert [path for path in (*memory, sockets) if path.exists()] == [], "an orderly end leaves nothing either"


def _until_gone(group: int) -> None:
    for _ in range(300):
        if not group_processes(group):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {group_processes(group)}")
