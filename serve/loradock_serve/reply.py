"""The answer to one request as it is written: not begun, streaming, or whole; and how it fails in each of these
states."""

import json
from typing import Any

from starlette.types import Send

from loradock_adapters.errors import LoradockError
from loradock_adapters.registry import Version
from loradock_serve import sse
from loradock_serve.http_errors import error_object, headers_of, status_of

Headers = list[tuple[bytes, bytes]]


class Reply:
    """Writes one ASGI response. Once bytes are out the status cannot change: errors become the stream's last event."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.model: str | None = None
        self.version: Version | None = None
        self.queue_s: float | None = None
        """How long the request waited for its turn; None before it has it."""
        self.status = 0
        self.error_code: str | None = None
        """The code of the error that it answered with, also where that came after the head of a stream."""
        self._send = send
        self.ended = False
        """Whether the last byte has been handed on."""

    async def start_stream(self) -> None:
        """Send the head of an event stream, unless a comment did already."""
        if self.status == 0:
            # x-accel-buffering: nginx would otherwise collect events before it passes them on.
            await self._start(200, b"text/event-stream; charset=utf-8", [(b"x-accel-buffering", b"no")])

    async def comment(self, text: str) -> None:
        """A sign of life in an event stream."""
        await self.start_stream()
        await self.write(sse.comment(text))

    async def write(self, data: bytes) -> None:
        """Bytes of a stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The end of a stream."""
        if not self.ended:
            await self._last(b"")

    async def whole(self, body: bytes, content_type: str, status: int = 200, headers: Headers | None = None) -> None:
        """A whole answer. Where a comment began a stream already, the answer is its one event."""
        if self.status != 0:
            await self.write(b"data: " + body + sse.END)
            await self.end()
            return
        await self._start(
            status, content_type.encode(), [*(headers or []), (b"content-length", str(len(body)).encode())]
        )
        await self._last(body)

    async def _last(self, body: bytes) -> None:
        # Only then has it ended: a client that takes nothing more keeps the send waiting, and must still be cut short.
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.ended = True

    async def fail(self, error: LoradockError) -> None:
        """An error of the gateway's own."""
        headers = [(key.encode(), value.encode()) for key, value in headers_of(error).items()]
        await self.fail_with(status_of(error), error_object(error), headers)

    async def fail_with(self, status: int, error: dict[str, Any], headers: Headers | None = None) -> None:
        """An error as OpenAI's JSON; in a stream that has begun, its last event (and no `[DONE]` after it)."""
        if self.ended:
            return
        code = error.get("code")  # engines put the status there once more: then the type says more
        self.error_code = code if isinstance(code, str) else str(error.get("type"))
        if self.status != 0:
            await self.write(sse.error_event(error))
            await self.end()
        else:
            await self.whole(json.dumps({"error": error}).encode(), "application/json", status, headers)

    async def _start(self, status: int, content_type: bytes, extra: Headers) -> None:
        self.status = status
        headers: Headers = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode("latin-1")),
            *extra,
        ]
        if self.queue_s is not None:
            headers.append((b"x-loradock-queue-ms", b"%d" % round(1000 * self.queue_s)))
        if self.version is not None:
            headers.append((b"x-loradock-version", str(self.version.number).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
