"""Streamed answers, as a client sees them: when the first token comes, and how long each next one takes.

Knows the form of the events and nothing of the scenarios. An event may hold several tokens where a server is behind:
gaps are between events, which is what a reader waits for.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import aiohttp

from against_stock.errors import BenchmarkError
from against_stock.traffic import body, session
from against_stock.workload import Call


@dataclass(frozen=True)
class Streamed:
    """One whole stream, in seconds from sending the request."""

    first_s: float
    latency_s: float
    tokens: int


async def events(client: aiohttp.ClientSession, call: Call) -> AsyncIterator[float]:
    """The time of each event with text, until the stream ends."""
    try:
        async with client.post("/v1/completions", json=body(call, stream=True)) as response:
            if response.status != 200:
                raise BenchmarkError(f"a stream of {call.model} got {response.status}: {await response.text()}")
            ended = False
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b'data: {"error"'):
                    raise BenchmarkError(f"a stream of {call.model} broke: {line.decode()}")
                elif line.startswith(b"data: "):
                    yield time.perf_counter()
            if not ended:
                raise BenchmarkError(f"a stream of {call.model} ended without [DONE]")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchmarkError(f"a stream of {call.model} broke: {error!r}") from error


async def ask_streamed(client: aiohttp.ClientSession, call: Call) -> Streamed:
    """One stream to its end. Its tokens are those asked for: servers are held to that by `traffic.ask`."""
    began = time.perf_counter()
    times = [moment async for moment in events(client, call)]
    if not times:
        raise BenchmarkError(f"a stream of {call.model} ended without a token")
    return Streamed(times[0] - began, times[-1] - began, call.max_tokens)


async def stream_all(url: str, calls: Sequence[Call], in_flight: int) -> tuple[list[Streamed], float]:
    """Every request, `in_flight` at a time; the streams as they ended, and the seconds it took."""
    done: list[Streamed] = []
    waiting = iter(calls)

    async def work(client: aiohttp.ClientSession) -> None:
        for call in waiting:
            done.append(await ask_streamed(client, call))

    async with session(url) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(in_flight)))
        return done, time.perf_counter() - began


async def note_gaps(client: aiohttp.ClientSession, call: Call, gaps_s: list[float], flows: asyncio.Event) -> None:
    """Read one long stream, adding every gap between two events to `gaps_s`; `flows` is set at its first. Made to be
    cancelled: a stream that ends by itself is an error."""
    last: float | None = None
    async for moment in events(client, call):
        if last is not None:
            gaps_s.append(moment - last)
        last = moment
        flows.set()
    raise BenchmarkError(f"a stream of {call.max_tokens} tokens ended before the measurement did")
