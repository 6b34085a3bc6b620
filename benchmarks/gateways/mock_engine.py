"""An engine that answers at once: it parses as little as it can and writes answers made beforehand.

    python benchmarks/gateways/mock_engine.py SOCKET

What it writes has the shape of vLLM's: compact JSON, and streams of server-sent events in chunked encoding, each event
written by itself, as an engine writes one for each step. Serves on a Unix socket and on a TCP port, which is printed.
"""

import asyncio
import json
import sys
from typing import Any, cast

import uvloop

EVENTS = 16
CREATED = 1_700_000_000
USAGE = {"prompt_tokens": 120, "completion_tokens": EVENTS, "total_tokens": 120 + EVENTS, "prompt_tokens_details": None}


def _dump(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
    return head % len(body) + b"content-type: application/json\r\n\r\n" + body


def _completion(text: str) -> bytes:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "tool_calls": [],
        "reasoning": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return _dump(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion",
            "created": CREATED,
            "model": "base",
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": USAGE,
            "prompt_logprobs": None,
        }
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(choices: list[dict[str, Any]], **rest: Any) -> bytes:
    event = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "base",
        "choices": choices,
    }
    return _chunk(b"data: " + _dump(event | rest) + b"\n\n")


def _delta(finish_reason: str | None, **delta: Any) -> bytes:
    return _event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])


STATUS = _answer(_dump({"device": "cpu", "lora_wrapper": "mock", "corrected": True, "registered": []}))
EMPTY = _answer(b"")
WHOLE = _answer(_completion("It is a lighthouse. " * EVENTS))
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = _delta(None, content=" a lighthouse")
USAGE_EVENT = _event([], usage=USAGE)
LAST = _delta("stop", content="")
DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class MockEngine(asyncio.Protocol):
    """One connection: a head, a body of the announced length, an answer; again."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of asyncio's
        self._loop = asyncio.get_running_loop()
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
            self._reply(head, body)

    def _reply(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /loradock/status"):
            self._transport.write(STATUS)
        elif head.startswith(b"get "):
            self._transport.write(EMPTY)
        elif b'"stream":true' in body or b'"stream": true' in body:
            end = USAGE_EVENT + DONE if b'"include_usage":true' in body.replace(b" ", b"") else DONE
            self._transport.write(STREAM_HEAD + _delta(None, role="assistant", content=""))
            self._loop.call_soon(self._go_on, EVENTS, end)
        else:
            self._transport.write(WHOLE)

    def _go_on(self, events: int, end: bytes) -> None:
        """One event each turn of the loop, which is a write of its own to the socket."""
        if events:
            self._transport.write(EVENT)
            self._loop.call_soon(self._go_on, events - 1, end)
        else:
            self._transport.write(LAST + end)


async def serve(socket: str) -> None:
    """Serve on a Unix socket and on a TCP port, which is printed."""
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(MockEngine, socket)
    server = await loop.create_server(MockEngine, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
