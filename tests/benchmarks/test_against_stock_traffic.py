"""The benchmark's client against small servers of our own: what it counts, and what it refuses to count."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from against_stock.errors import BenchmarkError
from against_stock.flood import beside
from against_stock.streams import note_gaps, stream_all
from against_stock.traffic import as_round, ask_all, session
from against_stock.workload import Call, shuffled

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The URL of a server that answers completions by `handler`."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def whole(asked: dict[str, Any], tokens: int | None = None) -> web.Response:
    """An answer that repeats its prompt."""
    answer = {"choices": [{"text": f"{asked['model']}: {asked['prompt']}"}]}
    count = asked["max_tokens"] if tokens is None else tokens
    return web.json_response(answer | {"usage": {"completion_tokens": count}})


async def answer_all(request: web.Request) -> web.Response:
    return whole(await request.json())


async def answer_stream(request: web.Request, end: bytes = b"data: [DONE]\n\n") -> web.StreamResponse:
    asked = await request.json()
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(asked["max_tokens"]):
        await response.write(b'data: {"choices": [{"text": "a"}]}\n\n')
    await response.write(end)
    return response


async def test_every_call_is_answered_once_and_in_order() -> None:
    calls = shuffled(["a", "b"], 20, 6, seed=1)
    async with serving(answer_all) as url:
        answers, took_s = await ask_all(url, calls, in_flight=4)
    assert [answer.text for answer in answers] == [f"{call.model}: {call.prompt}" for call in calls]
    assert as_round(answers, took_s).tokens_per_s == pytest.approx(20 * 6 / took_s)


async def test_no_more_than_in_flight_are_asked_at_once() -> None:
    now, most = 0, 0

    async def count(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        asked = await request.json()
        now -= 1
        return whole(asked)

    async with serving(count) as url:
        await ask_all(url, shuffled(["a"], 30, 6, seed=1), in_flight=3)
    assert most <= 3


async def test_answer_with_too_few_tokens_ends_the_comparison() -> None:
    async def short(request: web.Request) -> web.Response:
        return whole(await request.json(), tokens=5)

    async with serving(short) as url:
        with pytest.raises(BenchmarkError, match="got 5 tokens, not 6"):
            await ask_all(url, shuffled(["a"], 3, 6, seed=1), in_flight=1)


async def test_error_answer_ends_the_comparison() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=503, text="not now")

    async with serving(refuse) as url:
        with pytest.raises(BenchmarkError, match="a request for a got 503: not now"):
            await ask_all(url, shuffled(["a"], 3, 6, seed=1), in_flight=2)


async def test_streams_are_read_to_their_end() -> None:
    async with serving(answer_stream) as url:
        streams, _ = await stream_all(url, shuffled(["a"], 10, 6, seed=1), in_flight=4)
    assert [stream.tokens for stream in streams] == [6] * 10
    assert all(0 < stream.first_s <= stream.latency_s for stream in streams)


@pytest.mark.parametrize(
    ("end", "message"),
    [(b"", r"ended without \[DONE\]"), (b'data: {"error": {"message": "gone"}}\n\n', "broke: .*gone")],
)
async def test_broken_stream_ends_the_comparison(end: bytes, message: str) -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        return await answer_stream(request, end)

    async with serving(broken) as url:
        with pytest.raises(BenchmarkError, match=message):
            await stream_all(url, shuffled(["a"], 1, 6, seed=1), in_flight=1)


async def test_stream_that_ends_before_the_measurement_is_an_error() -> None:
    gaps: list[float] = []
    async with serving(answer_stream) as url, session(url) as client:
        with pytest.raises(BenchmarkError, match="a stream of 6 tokens ended"):
            await note_gaps(client, Call("a", "b", 6), gaps, asyncio.Event())
    assert len(gaps) == 5


async def test_failing_flood_ends_the_measurement_of_the_one_beside_it() -> None:
    async def refuse_the_flood(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.Response(status=500, text="no") if asked["user"] == "tenant-a" else whole(asked)

    async with serving(refuse_the_flood) as url:
        with pytest.raises(BenchmarkError, match="a request for flooding got 500"):
            await beside(url, in_flight=2, seconds=5, seed=1, settle_s=0)


async def test_request_beside_a_flood_is_asked_once_a_second() -> None:
    asked_by: list[str] = []

    async def note(request: web.Request) -> web.Response:
        asked = await request.json()
        asked_by.append(asked["user"])
        await asyncio.sleep(0)
        return whole(asked)

    async with serving(note) as url:
        answers = await beside(url, in_flight=2, seconds=1, seed=1, settle_s=0)
    assert len(answers) == asked_by.count("tenant-b") == 1
    assert asked_by.count("tenant-a") > 1
