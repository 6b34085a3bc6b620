"""What the gateway adds to an engine that answers at once: milliseconds at one connection, requests/s at many.

    python benchmarks/gateway_overhead.py [--requests 400] [--seconds 3] [--connections 32]

The engine is a mock that parses as little as it can and writes answers made beforehand, so that everything measured on
top of it is the gateway. Three processes: this client, the gateway as `loradock serve` runs it (attached to the mock
over a Unix socket), the mock. Rounds against the gateway and against the mock alone alternate, and medians are
compared, so a busy machine harms both sides alike. Prints a table, then one JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

EVENTS = 16
ROUNDS = 8
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MESSAGES = [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": "What is it? " * 20}]
USAGE = {"prompt_tokens": 120, "completion_tokens": EVENTS, "total_tokens": 120 + EVENTS}


# The mock engine


def _dump(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _whole(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STATUS = {"device": "cpu", "lora_wrapper": "mock", "corrected": True, "registered": []}
MESSAGE = {"role": "assistant", "content": "It is a lighthouse. " * EVENTS}
WHOLE = _whole(_dump({"id": "c", "model": "base", "choices": [{"index": 0, "message": MESSAGE}], "usage": USAGE}))
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
DELTA = {"index": 0, "delta": {"content": "a lighthouse"}, "finish_reason": None}
EVENT = _chunk(b"data: " + _dump({"id": "c", "model": "base", "choices": [DELTA]}) + b"\n\n")
STREAM_END = (
    _chunk(b"data: " + _dump({"id": "c", "model": "base", "choices": [], "usage": USAGE}) + b"\n\n")
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


class MockEngine(asyncio.Protocol):
    """One connection: a head, a body of the announced length, an answer; again."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of asyncio's
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            announced = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            stop = end + 4 + int(announced or b"0")
            if len(self._data) < stop:
                return
            body, self._data = self._data[end + 4 : stop], self._data[stop:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /loradock/status"):
            self._transport.write(_whole(_dump(STATUS)))
        elif head.startswith(b"get "):
            self._transport.write(_whole(b""))
        elif b'"stream": true' in body:
            self._transport.write(STREAM_HEAD)
            for _ in range(EVENTS):
                self._transport.write(EVENT)
            self._transport.write(STREAM_END)
        else:
            self._transport.write(WHOLE)


async def mock_engine(socket: str) -> None:
    """Serve on a Unix socket and on a TCP port, which is printed."""
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(MockEngine, socket)
    server = await loop.create_server(MockEngine, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


# The client


@dataclass(frozen=True)
class Timing:
    """One request, in seconds."""

    first_byte_s: float
    total_s: float


class Connection:
    """One keep-alive connection that asks the same question again and again."""

    def __init__(self, port: int, streams: bool) -> None:
        body = json.dumps({"model": "base", "messages": MESSAGES, "max_tokens": 16, "stream": streams}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        self._request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
        self._port = port

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self) -> Timing:
        began = time.perf_counter()
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        first_s = time.perf_counter() - began
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length:
            await self._reader.readexactly(int(length[1]))
        else:
            await self._reader.readuntil(b"0\r\n\r\n")
        return Timing(first_s, time.perf_counter() - began)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def latencies(port: int, streams: bool, requests: int) -> list[Timing]:
    """One connection, one request after the other; a tenth more first, which does not count."""
    connection = Connection(port, streams)
    await connection.open()
    timings = [await connection.ask() for _ in range(requests + requests // 10)]
    await connection.close()
    return timings[requests // 10 :]


async def rate(port: int, streams: bool, connections: int, seconds: float) -> float:
    """Requests per second with every connection always busy."""
    clients = [Connection(port, streams) for _ in range(connections)]
    await asyncio.gather(*(client.open() for client in clients))
    until = time.perf_counter() + seconds
    answered = 0

    async def run(client: Connection) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            await client.ask()
            answered += 1

    began = time.perf_counter()
    await asyncio.gather(*(run(client) for client in clients))
    took_s = time.perf_counter() - began
    await asyncio.gather(*(client.close() for client in clients))
    return answered / took_s


# The processes


@contextlib.contextmanager
def mock_and_gateway() -> Iterator[tuple[int, int]]:
    """The ports of the mock alone and of the gateway in front of it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Path(name)
        socket = place / "mock.sock"
        (place / "base").mkdir()
        (place / "base" / "config.json").write_text(json.dumps(BASE_CONFIG))
        mock = subprocess.Popen([sys.executable, __file__, "--mock", str(socket)], stdout=subprocess.PIPE, text=True)
        config = place / "serve.yaml"
        config.write_text(f"base: {place}/base\nport: 0\ndata_dir: {place}/data\nengine: {{url: 'unix://{socket}'}}\n")
        environment = {key: value for key, value in os.environ.items() if key != "LORADOCK_ADMIN_KEY"}
        serve = [sys.executable, "-c", "from loradock_adapters.cli import main; main()", "serve", str(config)]
        log = place / "gateway.log"
        with log.open("w") as file:
            gateway = subprocess.Popen(serve, stderr=file, env=environment)
        try:
            assert mock.stdout is not None
            yield int(mock.stdout.readline()), _port_of(gateway, log)
        finally:
            for process in (gateway, mock):
                process.terminate()
                process.wait()


def _port_of(gateway: subprocess.Popen[bytes], log: Path) -> int:
    while gateway.poll() is None:
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


async def measure(requests: int, seconds: float, connections: int) -> list[dict[str, Any]]:
    """One row for whole answers and one for streams."""
    rows = []
    with mock_and_gateway() as ports:
        for streams in (False, True):
            timings: list[list[Timing]] = [[], []]
            rates: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for side, port in enumerate(ports):
                    timings[side] += await latencies(port, streams, requests // ROUNDS)
            for _ in range(2):
                for side, port in enumerate(ports):
                    rates[side].append(await rate(port, streams, connections, seconds / 2))
            rows.append(_row(streams, timings, rates))
    return rows


def _row(streams: bool, timings: list[list[Timing]], rates: list[list[float]]) -> dict[str, Any]:
    totals = [sorted(timing.total_s for timing in side) for side in timings]
    firsts = [statistics.median(timing.first_byte_s for timing in side) for side in timings]
    medians = [statistics.median(side) for side in totals]
    p95s = [side[int(len(side) * 0.95)] for side in totals]
    return {
        "answers": f"streamed, {EVENTS} events" if streams else "whole",
        "mock_ms": round(1000 * medians[0], 3),
        "gateway_ms": round(1000 * medians[1], 3),
        "added_ms": round(1000 * (medians[1] - medians[0]), 3),
        "added_p95_ms": round(1000 * (p95s[1] - p95s[0]), 3),
        "added_first_byte_ms": round(1000 * (firsts[1] - firsts[0]), 3),
        "mock_per_s": round(statistics.median(rates[0])),
        "gateway_per_s": round(statistics.median(rates[1])),
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=400, help="requests for each latency")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds for each rate")
    parser.add_argument("--connections", type=int, default=32, help="connections for each rate")
    parser.add_argument("--mock", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mock:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(mock_engine(arguments.mock))
        return
    rows = uvloop.run(measure(arguments.requests, arguments.seconds, arguments.connections))
    columns = list(rows[0])
    print("".join(f"{column:>22}" for column in columns))
    for row in rows:
        print("".join(f"{row[column]!s:>22}" for column in columns))
    print(json.dumps({"benchmark": "gateway_overhead", "connections": arguments.connections, "rows": rows}))


if __name__ == "__main__":
    main()
