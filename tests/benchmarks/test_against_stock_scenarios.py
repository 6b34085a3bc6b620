"""Whole cells of the benchmark against two small servers of our own, which run in a thread as real ones run apart."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from against_stock import loads, many
from against_stock.bars import judged
from against_stock.duel import SETTLE_S, duel
from against_stock.errors import BenchmarkError
from against_stock.figures import OURS, STOCK
from against_stock.loads import ONE_WORD, phase_of
from against_stock.servers import Server, Setup


class FakeServer(Server):
    """Answers whole and streamed completions in this process; notes what it was asked."""

    def __init__(self, label: str, place: Path) -> None:
        super().__init__(Setup(place), place)
        self.label = label
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[str] = []

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        return app

    async def _load(self, request: web.Request) -> web.Response:
        self.loaded.append((await request.json())["lora_name"])
        return web.Response()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append(asked)
        if not asked.get("stream"):
            answer = {"choices": [{"text": asked["prompt"]}], "usage": {"completion_tokens": asked["max_tokens"]}}
            return web.json_response(answer)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(asked["max_tokens"]):
            await response.write(b'data: {"choices": [{"text": "a"}]}\n\n')
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response

    def start(self) -> None: ...

    def wait_until_ready(self) -> None: ...

    def register(self, adapters: Any) -> list[float]:
        return [0.0 for _ in adapters]

    def effective(self) -> dict[str, Any]:
        return {}


@contextlib.contextmanager
def in_a_thread(servers: list[FakeServer]) -> Iterator[None]:
    """Serve until the block ends; each server's URL is set when it begins."""
    loop = asyncio.new_event_loop()

    async def begin() -> list[web.AppRunner]:
        runners = []
        for server in servers:
            runner = web.AppRunner(server.app())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            runners.append(runner)
        return runners

    runners = loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        for runner in runners:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[FakeServer, FakeServer]]:
    pair = FakeServer("stock", tmp_path / "stock"), FakeServer("ours", tmp_path / "ours")
    with in_a_thread(list(pair)):
        yield pair


def test_both_sides_of_a_cell_get_the_same_requests(sides: tuple[FakeServer, FakeServer]) -> None:
    settled: list[float] = []
    result = duel(sides, ["a", "b"], requests=12, max_tokens=48, rounds=2, in_flight=4, settle=settled.append)
    assert result["same_answers"] == 1.0
    assert len(result["ratio_by_round"]) == 2
    # Longer than a vLLM worker spins after its last step, before every pass of either side.
    assert settled == [SETTLE_S] * 4
    assert SETTLE_S > 1
    measured = [sorted(a["prompt"] for a in side.asked if a["max_tokens"] == 48) for side in sides]
    assert measured[0] == measured[1]
    assert len(set(measured[0])) == 24
    assert {asked["model"] for side in sides for asked in side.asked} == {"a", "b"}


def test_cell_with_a_server_that_is_gone_says_which(sides: tuple[FakeServer, FakeServer]) -> None:
    sides[1].url = "http://127.0.0.1:1"
    with pytest.raises(BenchmarkError, match="ours: a request for a got no answer"):
        duel(sides, ["a"], requests=2, max_tokens=4, rounds=1, in_flight=2, settle=lambda _seconds: None)


def test_many_adapters_are_compared_with_a_few(sides: tuple[FakeServer, FakeServer]) -> None:
    names = [f"adapter-{number}" for number in range(100)]
    result = {"scenario": "zipf", "adapters": 100, **many.compare(sides, names, requests=64, rounds=1)}
    for side in (STOCK, OURS):
        result[side]["registering"] = {"total_s": 1.0, "median_ms": 2.0, "p99_ms": 3.0}
    assert result[OURS]["kept"] == pytest.approx(
        result[OURS]["zipf"]["tokens_per_s"] / result[OURS]["few"]["tokens_per_s"], abs=0.001
    )
    assert [bar["measured"] for bar in judged(result)] == [result[OURS]["kept"]]
    assert "100 adapters, Zipf(1)" in many.shown(result)
    asked = [{a["model"] for a in side.asked if a["max_tokens"] == 48} for side in sides]
    assert asked[0] == asked[1] > set(names[:8])


async def test_loads_are_asked_for_beside_streams(
    sides: tuple[FakeServer, FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The servers' thread goes on however long this one is kept waiting, and must not come to the end meanwhile.
    monkeypatch.setattr(loads, "STREAM_TOKENS", 100_000)
    stock = sides[0]
    gaps, calls_s = await phase_of(stock.url, ["fresh-0", "stream-0"], {"fresh-0": tmp_path}, seconds=1.2)
    assert stock.loaded == ["fresh-0"]
    assert len(calls_s) == 2
    assert [asked["model"] for asked in stock.asked if asked["prompt"] == ONE_WORD] == ["fresh-0", "stream-0"]
    assert len(gaps) > 8
    assert min(gaps) >= 0
