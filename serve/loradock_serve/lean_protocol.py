"""The server's side of HTTP: uvicorn's protocol, with a shorter way for POST requests to the paths that are hot.

    class Protocol(LeanProtocol): hot = hot_paths(...)
    uvicorn.Config(app, http=Protocol, …)

On those paths `LeanCycle` holds the ASGI conversation in uvicorn's place: no event, timer or regular expression for
each message, and a whole answer goes out in one write. A client of HTTP/1.0, which knows no chunks (nginx, where it is
not told otherwise), reads a stream until its connection is closed. Everything unusual (`Expect`, upgrades, pipelined
requests) and every other path stays uvicorn's own. Knows nothing of what the paths mean.

The scope of such a request has an extension, `loradock.hang_up`: a function that takes a callback, which is called at
most once, when the client hangs up before its answer is complete. It spares a task that waits in `receive()` for
nothing else.

Touches of uvicorn that are not public: the names of `HttpToolsProtocol`'s own methods and attributes, and those that it
expects of a cycle. `tests/serve/test_lean_protocol.py` goes through each of them.
"""

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from loradock_serve.batched_writes import batched_writes

HANG_UP = "loradock.hang_up"
BODY = "http.response.body"
READ_AHEAD_BYTES = 1024**2
"""What may wait to be sent to one client before whoever makes it waits, too: longer than most answers, so that the
engine's place is free when the engine is done, however slowly the client reads."""
STALLED_S = 60.0
"""How long a client may take nothing at all of what waits to be sent to it; then its connection is broken."""

VERSIONS = {"1.1", "1.0"}
"""Of HTTP, that take the short way."""
H2C, NO_H2C = b"\r\nUpgrade: h2c\r\n", b"\r\nX-Ignored-Upgrade: h2c\r\n"
"""Java's HTTP client offers HTTP/2 with its first request, body and all, which is to be answered as if it had not
(RFC 9110, 7.8): the parser here would drop the body."""


def hot_paths(paths: Iterable[str]) -> Mapping[bytes, str]:
    """As a protocol's `hot` has them: by the bytes of the request line, which must be just these."""
    return {path.encode(): path for path in paths}


class LeanCycle:
    """One request and its answer, as an ASGI application sees them (`receive`, `send`)."""

    def __init__(self, protocol: "LeanProtocol", scope: Scope, keep_alive: bool, knows_chunks: bool = True) -> None:
        self.keep_alive = keep_alive
        self._knows_chunks = knows_chunks
        self.disconnected = False
        self.response_complete = False
        self.begun = False
        self._scope = scope
        self._protocol = protocol
        self._transport: asyncio.Transport = protocol.transport
        self._flow: FlowControl = protocol.flow
        self._writes = protocol.writes
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._more_body = True
        self._body_given = False
        self._waiter: asyncio.Future[None] | None = None
        self._hang_up: Callable[[], None] | None = None
        self._response_started = False
        self._held = b""
        """The head of a whole answer, which goes out with its body."""
        self._missing_bytes = -1
        """Bytes of the answer that are still to come; -1 where nobody said how many."""
        scope["extensions"] = {HANG_UP: self._on_hang_up}

    @property
    def message_event(self) -> "LeanCycle":
        """What uvicorn's protocol calls `set()` on when there is news."""
        return self

    def set(self) -> None:
        """There is news: a piece of the body, the end of the connection, or the end of the answer."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.disconnected and self._hang_up is not None:
            hang_up, self._hang_up = self._hang_up, None
            hang_up()

    def _on_hang_up(self, callback: Callable[[], None]) -> None:
        if self.disconnected:
            callback()
        else:
            self._hang_up = callback

    def feed(self, data: bytes) -> None:
        """A piece of the request's body has come."""
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > HIGH_WATER_LIMIT:
            self._flow.pause_reading()
        self.set()

    def end(self) -> None:
        """The request's body has come."""
        self._more_body = False
        self.set()

    async def run(self, app: ASGIApp) -> None:
        """The application, from beginning to end; one that fails is a 500."""
        try:
            await app(self._scope, self.receive, self.send)
            if not self.response_complete and not self.disconnected:
                self._protocol.logger.error("The application returned without completing its answer")
        except Exception:  # whatever it is: the connection and its client must learn of it
            self._protocol.logger.exception("Exception in ASGI application")
            await self._fail()
        finally:
            if not self.response_complete and not self.disconnected:
                self._writes.flush()
                self._transport.close()
            # Circles of references, which would leave each request to the garbage collector.
            self._scope, self._hang_up = {}, None

    async def _fail(self) -> None:
        if not self._response_started:
            text = b"Internal Server Error"
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
            self.keep_alive = False
            await self.send({"type": "http.response.start", "status": 500, "headers": headers})
            await self.send({"type": BODY, "body": text})

    async def receive(self) -> Message:
        """ASGI."""
        while not (self.disconnected or self.response_complete):
            if not self._body_given and (self._body or not self._more_body):
                data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                self._body, self._body_bytes = [], 0
                self._body_given = not self._more_body
                if self._body_given:  # a connection that is not read does not show that its client hangs up
                    self._flow.resume_reading()
                return {"type": "http.request", "body": data, "more_body": self._more_body}
            self._flow.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI."""
        if self._flow.write_paused and not self.disconnected:
            await self._flow.drain()
        if self.disconnected:
            return
        if message["type"] == BODY and self._response_started and not self.response_complete:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        elif message["type"] == "http.response.start" and not self._response_started:
            self._send_head(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"ASGI message {message['type']!r} at the wrong moment")

    def _send_head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._response_started = True
        lines = [STATUS_LINE[status]]
        for name, value in (*self._protocol.server_state.default_headers, *headers):
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                self._missing_bytes = int(value)
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self._missing_bytes < 0 and self._knows_chunks:
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            self._response_started, self._missing_bytes = False, -1
            raise RuntimeError("a header's value holds a line end")
        if self._missing_bytes < 0:
            self._writes.write(self._transport, head + b"\r\n")
        else:
            self._held = head + b"\r\n"

    def _send_body(self, data: bytes, more: bool) -> None:
        if self._missing_bytes >= 0:
            self._missing_bytes -= len(data)
            if self._missing_bytes < 0 or (self._missing_bytes and not more):
                raise RuntimeError("the answer is not as long as its content-length")
            self._writes.write(self._transport, self._held + data if self._held else data)
            self._held = b""
        elif not self._knows_chunks:
            self._writes.write(self._transport, data)
        elif data:
            end = b"\r\n" if more else b"\r\n0\r\n\r\n"
            self._writes.write(self._transport, b"%x\r\n%b%b" % (len(data), data, end))
        elif not more:
            self._writes.write(self._transport, b"0\r\n\r\n")
        if not more:
            self.response_complete = True
            if not self.keep_alive:
                self._writes.flush()
                self._transport.close()
            self._protocol.on_response_complete()
            self.set()


class LeanProtocol(HttpToolsProtocol):
    """One client's connection."""

    hot: Mapping[bytes, str] = {}
    """Paths that take the short way, by their bytes in the request line."""
    _lean: LeanCycle | None = None
    """The latest request that took it."""
    _idle_since_s: float | None = None
    _stall_timer: TimerHandle | None = None
    _unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=READ_AHEAD_BYTES)
        self.writes = batched_writes()

    # httptools

    def on_headers_complete(self) -> None:
        """httptools."""
        path = self.hot.get(self.url)
        version = self.parser.get_http_version()
        if path is None or version not in VERSIONS or not self._is_plain_post():
            super().on_headers_complete()
            return
        scope = cast(Scope, self.scope)
        scope["method"], scope["path"], scope["raw_path"], scope["query_string"] = "POST", path, self.url, b""
        if version == "1.1":
            self._lean = LeanCycle(self, scope, self.parser.should_keep_alive())
        else:
            scope["http_version"] = version
            self._lean = LeanCycle(self, scope, keep_alive=False, knows_chunks=False)
        self.cycle = cast(Any, self._lean)

    def _is_plain_post(self) -> bool:
        return (
            self.parser.get_method() == b"POST"
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            and self.limit_concurrency is None
            and not self.root_path
            and (self.cycle is None or self.cycle.response_complete)
        )

    def on_body(self, body: bytes) -> None:
        """httptools."""
        lean = self._lean
        if lean is None or self.cycle is not cast(Any, lean):
            super().on_body(body)
        elif not lean.response_complete:
            lean.feed(body)

    def on_message_complete(self) -> None:
        """httptools."""
        lean = self._lean
        if lean is None or self.cycle is not cast(Any, lean):
            super().on_message_complete()
        elif not lean.response_complete:
            lean.end()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """asyncio. The application begins once all that came has been parsed: mostly that is the whole request."""
        if (self.cycle is None or self.cycle.response_complete) and H2C in data:  # not each piece of a long body
            head, end, body = data.partition(b"\r\n\r\n")
            data = (head + end[:2]).replace(H2C, NO_H2C) + end[2:] + body
        super().data_received(data)
        lean = self._lean
        if lean is not None and not lean.begun:
            lean.begun = True
            task = self.loop.create_task(lean.run(self.app))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        super().connection_lost(exc)
        for timer in (self.timeout_keep_alive_task, self._stall_timer):
            if timer is not None:
                timer.cancel()
        lean = self._lean
        if lean is not None and not lean.response_complete and not lean.disconnected:  # another is queued behind it
            lean.disconnected = True
            lean.set()

    def pause_writing(self) -> None:
        """asyncio: more waits to be sent than should."""
        super().pause_writing()
        self._look_for_progress_later()

    def resume_writing(self) -> None:
        """asyncio: enough of it has been sent."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _look_for_progress_later(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALLED_S, self._look_for_progress)

    def _look_for_progress(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent_bytes:
            self._look_for_progress_later()
        else:  # whoever waits to write on would wait for ever, and hold a place in the engine meanwhile
            self.transport.abort()

    def shutdown(self) -> None:
        """uvicorn: the server ends."""
        self.writes.flush()  # an answer that is complete may still wait to be written
        super().shutdown()

    # One timer for a connection, which looks when it fires how long the connection has been idle

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = None

    def on_response_complete(self) -> None:
        """uvicorn: an answer is complete."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self._look_in(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn: the timer fired."""
        self.timeout_keep_alive_task = None
        if self._idle_since_s is None:
            return
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self._look_in(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _look_in(self, seconds: float) -> TimerHandle:
        return self.loop.call_later(seconds, self.timeout_keep_alive_handler)
