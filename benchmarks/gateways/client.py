"""The client of the benchmark: keep-alive connections that ask the same question again and again.

Does no more than find the end of an answer, because it shares the machine with what it measures. The first answer of
every connection is looked at in full.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, cast

MESSAGES = [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": "What is it? " * 20}]
END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass(frozen=True)
class Timing:
    """One request, in seconds."""

    first_byte_s: float
    total_s: float


class Connection(asyncio.Protocol):
    """One request at a time; `ask()` returns when its answer is whole."""

    def __init__(self, port: int, streams: bool) -> None:
        body = json.dumps({"model": "base", "messages": MESSAGES, "max_tokens": 16, "stream": streams}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        self._request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
        self._port = port
        self._streams = streams

    async def open(self) -> None:
        """Connect, ask once, and look whether the answer is one."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        await self.ask()
        check(b"".join(self._parts), self._streams)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the connection was closed: {error}"))

    def ask(self) -> asyncio.Future[Timing]:
        """Send the request."""
        self._parts: list[bytes] = []
        self._missing = -1
        self._answer: asyncio.Future[Timing] = asyncio.get_running_loop().create_future()
        self._began = time.perf_counter()
        self._transport.write(self._request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        first = not self._parts
        self._parts.append(data)
        if first:
            self._first_s = time.perf_counter() - self._began
            head, ended, body = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200") or not ended:
                self._answer.set_exception(RuntimeError(data.decode(errors="replace")))
                return
            announced = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._missing = int(announced) - len(body) if announced else -1
        elif self._missing > 0:
            self._missing -= len(data)
        if self._missing == 0 or (self._missing < 0 and self._has_last_chunk(data)):
            self._answer.set_result(Timing(self._first_s, time.perf_counter() - self._began))

    def _has_last_chunk(self, data: bytes) -> bool:
        tail = data if len(data) >= len(END_OF_CHUNKS) else b"".join(self._parts[-len(END_OF_CHUNKS) :])
        return tail.endswith(END_OF_CHUNKS)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


def check(answer: bytes, streams: bool) -> None:
    """RuntimeError where an answer is not the mock's."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"content-length" not in head.lower():
        body = _without_chunks(body)
    if streams:
        events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
        deltas = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
        text = "".join(delta.get("content") or "" for delta in deltas)
        right = events[-1] == b"[DONE]" and text.count("lighthouse") == 16
    else:
        data: Any = json.loads(body)
        right = data["choices"][0]["message"]["content"].count("lighthouse") == 16 and bool(data["usage"])
    if not right:
        raise RuntimeError(f"not the mock's answer: {answer.decode(errors='replace')}")


def _without_chunks(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return body


async def latencies(port: int, streams: bool, requests: int) -> list[Timing]:
    """One connection, one request after the other; a tenth more first, which does not count."""
    connection = Connection(port, streams)
    await connection.open()
    timings = [await connection.ask() for _ in range(requests + requests // 10)]
    connection.close()
    return timings[requests // 10 :]


@dataclass(frozen=True)
class Load:
    """What came of keeping every connection busy."""

    requests: int
    """Answered, the first one of each connection not counted."""
    connections: int
    seconds: float


async def load(port: int, streams: bool, connections: int, seconds: float) -> Load:
    """Every connection always busy for so long."""
    clients = [Connection(port, streams) for _ in range(connections)]
    await asyncio.gather(*(client.open() for client in clients))
    answered = 0
    began = time.perf_counter()
    until = began + seconds

    async def run(client: Connection) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            await client.ask()
            answered += 1

    await asyncio.gather(*(run(client) for client in clients))
    took_s = time.perf_counter() - began
    for client in clients:
        client.close()
    return Load(answered, connections, took_s)
