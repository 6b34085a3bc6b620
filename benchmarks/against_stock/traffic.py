"""The client: keeps a number of requests in flight and notes when each was sent and answered.

The same code, on the same cores, for both sides, over loopback TCP. Every answer is checked: a status other than 200 or
a wrong number of tokens ends the benchmark, since whoever answers less is not quicker.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from against_stock.errors import BenchmarkError
from against_stock.figures import Round
from against_stock.workload import Call

QUEUE_HEADER = "x-loradock-queue-ms"
TIMEOUT_S = 600.0
"""No request of any scenario takes this long, unless its server hangs."""


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    latency_s: float
    tokens: int
    text: str
    queue_s: float | None = None
    """How long it waited in Loradock's queue, by its own account; None where the server says nothing of it."""


def session(url: str) -> aiohttp.ClientSession:
    """Connections without a limit: what is in flight is the caller's choice."""
    return aiohttp.ClientSession(
        base_url=url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
    )


def body(call: Call, **fields: Any) -> dict[str, Any]:
    """The JSON of a request; the answer has exactly `max_tokens` tokens."""
    document = {"model": call.model, "prompt": call.prompt, "max_tokens": call.max_tokens, "temperature": 0}
    document |= {"ignore_eos": True, **fields}
    return document if call.user is None else document | {"user": call.user}


async def ask(client: aiohttp.ClientSession, call: Call) -> Answer:
    """One request."""
    began = time.perf_counter()
    try:
        async with client.post("/v1/completions", json=body(call)) as response:
            if response.status != 200:
                raise BenchmarkError(f"a request for {call.model} got {response.status}: {await response.text()}")
            document = await response.json()
            queued_ms = response.headers.get(QUEUE_HEADER)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchmarkError(f"a request for {call.model} got no answer: {error!r}") from error
    latency_s = time.perf_counter() - began
    tokens = document["usage"]["completion_tokens"]
    if tokens != call.max_tokens:
        raise BenchmarkError(f"a request for {call.model} got {tokens} tokens, not {call.max_tokens}")
    queue_s = float(queued_ms) / 1000 if queued_ms is not None else None
    return Answer(latency_s, tokens, document["choices"][0]["text"], queue_s)


async def ask_all(url: str, calls: Sequence[Call], in_flight: int) -> tuple[list[Answer], float]:
    """Every request, `in_flight` at a time; the answers in the order of the calls, and the seconds it took."""
    answers: list[Answer | None] = [None] * len(calls)
    waiting: Iterator[tuple[int, Call]] = iter(enumerate(calls))

    async def work(client: aiohttp.ClientSession) -> None:
        for number, call in waiting:
            answers[number] = await ask(client, call)

    async with session(url) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(in_flight)))
        took_s = time.perf_counter() - began
    return [answer for answer in answers if answer is not None], took_s


def as_round(answers: Sequence[Answer], took_s: float) -> Round:
    """The figures of one pass."""
    return Round(sum(answer.tokens for answer in answers) / took_s, tuple(answer.latency_s for answer in answers))
