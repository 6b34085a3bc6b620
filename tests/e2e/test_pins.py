"""A pinned adapter on a real engine with two slots: it keeps its slot under traffic on more adapters, and through a
crash."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from loradock_testing.loradock_server import LoradockServer, children, group_processes, loradock_server
from loradock_testing.tiny_models import make_adapter, make_llama

pytestmark = pytest.mark.engine

SLOTS = 2
OTHERS = tuple(f"other-{number}" for number in range(4))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoradockServer]:
    root = tmp_path_factory.mktemp("pins")
    base = make_llama(root / "base")
    settings = {"dtype": "float32", "max_loras": SLOTS, "max_cpu_loras": 8, "kv_cache_gib": 1}
    with loradock_server(base, root / "data", engine=settings) as running:
        for seed, name in enumerate(("pinned", *OTHERS)):
            running.loradock("push", str(make_adapter(root / name, base, seed)), name)
        yield running


def residency(server: LoradockServer, name: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/adapters/{name}", timeout=30).raise_for_status().json()
    whole: dict[str, Any] = found["residency"] | {"listed": found["pinned"]}
    return whole


def residency_now(server: LoradockServer, name: str) -> dict[str, Any]:
    """As the engine says after this was asked: what the gateway knows of it is up to a second old."""
    began = time.monotonic()
    while True:
        found = residency(server, name)
        seen_s = found["seen_seconds_ago"]
        if seen_s is not None and seen_s <= time.monotonic() - began:
            return found
        assert time.monotonic() - began < 60, f"{found}\n{server.logs()}"
        time.sleep(0.1)


async def ask_all(server: LoradockServer, models: tuple[str, ...], rounds: int) -> list[int]:
    """All at once; the statuses."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        body = {"prompt": "def main():", "max_tokens": 24, "ignore_eos": True}
        asked = (client.post("/v1/completions", json=body | {"model": model}) for model in models * rounds)
        return [answer.status_code for answer in await asyncio.gather(*asked)]


def test_pinned_adapter_keeps_its_slot_under_traffic_and_leaves_it_when_unpinned(server: LoradockServer) -> None:
    answer = server.tokens("pinned", "def", 8)
    server.loradock("pin", "pinned")
    assert residency(server, "pinned")["pin"] == {"state": "held", "waits_for": None}
    refused = server.loradock("pin", "other-0", check=False)
    assert refused.returncode == 1
    assert "1 of this server's 2 slots are pinned (pinned), and 1 may be" in refused.stderr

    before = residency_now(server, "pinned")  # the proofs of the others have used its slot before it was pinned
    for _ in range(3):
        assert set(asyncio.run(ask_all(server, (*OTHERS, "pinned"), 4))) == {200}
        seen = residency_now(server, "pinned")
        assert (seen["place"], seen["slot_evictions"]) == ("slot", before["slot_evictions"])
    assert seen["activations"] == before["activations"], "it was never written again"
    assert server.tokens("pinned", "def", 8) == answer
    assert "pinned" in server.loradock("show", "pinned").stdout

    server.loradock("unpin", "pinned")
    assert set(asyncio.run(ask_all(server, OTHERS, 4))) == {200}
    freed = residency_now(server, "pinned")
    assert (freed["pin"], freed["place"], freed["listed"]) == (None, "cpu", False)


def test_pin_is_held_again_by_the_engine_that_comes_after_a_crash(server: LoradockServer) -> None:
    server.loradock("pin", "pinned")
    (launcher,) = children(server.pid)
    titles = group_processes(launcher)
    worker = next(pid for pid, title in titles.items() if "Worker" in title and "launcher.py" not in title)
    os.kill(worker, signal.SIGKILL)
    until_pin_is(server, "waiting")
    server.wait_healthy()
    until_pin_is(server, "held")
    assert set(asyncio.run(ask_all(server, (*OTHERS, "pinned"), 2))) == {200}
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    assert 'loradock_adapter_slots{state="pinned"} 1.0' in metrics


def until_pin_is(server: LoradockServer, state: str, timeout_s: float = 120.0) -> None:
    """Returns when the pin is in this state; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (pin := residency(server, "pinned")["pin"])["state"] != state:
        assert time.monotonic() < deadline, f"{pin}\n{server.logs()}"
        time.sleep(0.1)
