"""HTTP/1.1 to one engine: connections that are kept and used again, and answers that are read as they come.

Just what the gateway needs of a client, because it is on the hot path: no redirects, no cookies, no compression, no
pipelining; one request at a time on a connection, and as many connections as there are requests. Parsing is
httptools' (llhttp). Knows nothing of models or routes.

An answer that is not read to its end when it is released breaks its connection: that is how an engine learns that
nobody waits any more.
"""

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

from loradock_serve.batched_writes import batched_writes

CONNECT_TIMEOUT_S = 10.0
# Bytes of an answer that nobody has taken yet; over it, the engine has to wait.
BUFFER_BYTES = 256 * 1024
COPIED_BYTES = 32 * 1024
CONNECTION_CLOSED = "the engine closed the connection"


class EngineGoneError(ConnectionError):
    """The engine cannot be reached, or went away before its answer was complete."""


class Answer:
    """One answer of an engine. Its head is here; its body may still be coming."""

    def __init__(self, connection: "Connection") -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        """Names in lower case; of several with one name, the last."""
        self.complete = False
        self._connection = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._error: EngineGoneError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = connection.loop

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")

    async def chunk(self) -> bytes:
        """Everything that has come since the last call, waiting for something; b"" at the end.

        EngineGoneError where the answer breaks off, after all that came before.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        if self._size >= BUFFER_BYTES:
            self._connection.resume()
        self._size = 0
        return data

    async def read(self, limit_bytes: int | None = None) -> bytes:
        """The whole body, or its first bytes."""
        parts = [await self.chunk()]
        size = len(parts[0])
        while not (self.complete and not self._parts) and (limit_bytes is None or size < limit_bytes):
            parts.append(await self.chunk())
            size += len(parts[-1])
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data if limit_bytes is None else data[:limit_bytes]

    async def head(self) -> None:
        """Returns when status and headers are here."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._news()

    def release(self) -> None:
        """Nobody reads any further: the connection is kept where the answer is complete, else broken."""
        self._connection.release(self)

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # What the connection tells it

    def begin(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The head has been read."""
        self.status, self.headers = status, headers
        self._wake()

    def feed(self, data: bytes) -> None:
        """A piece of the body has been read."""
        self._parts.append(data)
        self._size += len(data)
        if self._size >= BUFFER_BYTES:
            self._connection.pause()
        self._wake()

    def end(self) -> None:
        """The body has been read."""
        self.complete = True
        self._wake()

    def fail(self, error: EngineGoneError) -> None:
        """It will not become complete."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One connection, with at most one request on it."""

    def __init__(self, pool: "Pool") -> None:
        self.idle_since_s = 0.0
        self.lost = False
        self.loop = asyncio.get_running_loop()
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[bytes, bytes] = {}
        self._reusable = True
        self._ends_with_connection = False
        self._paused = False

    def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request."""
        self._answer = answer = Answer(self)
        if self.lost:  # between its making and this
            answer.fail(EngineGoneError(CONNECTION_CLOSED))
            return answer
        if len(body) <= COPIED_BYTES:  # copying it costs less than a second system call
            self._writes.write(self._transport, head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return answer

    def release(self, answer: Answer) -> None:
        """As `Answer.release`; once."""
        if self._answer is not answer:
            return
        self._answer = None
        if answer.complete and self._reusable and not self.lost:
            self._pool.put(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Break the connection; whoever still waits for its answer learns of it."""
        self._transport.abort()

    def pause(self) -> None:
        """Read no further for now."""
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of asyncio's
        self._writes = batched_writes()

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        if self._answer is None or self._answer.complete:  # an engine that speaks unasked
            self._reusable = False
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._answer.fail(EngineGoneError(f"the engine's answer is not HTTP: {error}"))
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio."""
        self.lost = True
        self._pool.forget(self)
        answer = self._answer
        if answer is None or answer.complete:
            return
        if error is None and answer.status and self._ends_with_connection:
            answer.end()
        else:
            answer.fail(EngineGoneError(f"{CONNECTION_CLOSED}: {error}" if error else CONNECTION_CLOSED))

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools."""
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """httptools."""
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if self._answer is None or self._answer.complete:
            self._reusable = False  # a second answer to one request
        elif status >= 200:  # 1xx announce an answer, and are none
            chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
            self._ends_with_connection = not chunked and b"content-length" not in headers
            self._answer.begin(status, headers)

    def on_body(self, data: bytes) -> None:
        """httptools."""
        if self._answer is not None and not self._answer.complete:
            self._answer.feed(data)

    def on_message_complete(self) -> None:
        """httptools."""
        if self._answer is not None and self._answer.status and not self._answer.complete:
            self._reusable = self._parser.should_keep_alive()
            self._answer.end()


class Exchange:
    """A request and its answer, as an async context manager: inside the block the answer's head is here."""

    def __init__(self, pool: "Pool", head: bytes, body: bytes, *, fresh: bool = False) -> None:
        self.reused = False
        """Whether its connection had been used before."""
        self._pool = pool
        self._head = head
        self._body = body
        self._fresh = fresh
        self._answer: Answer | None = None

    async def __aenter__(self) -> Answer:
        connection = None if self._fresh else self._pool.take()
        self.reused = connection is not None
        if connection is None:
            connection = await self._pool.connect()
        self._answer = answer = connection.ask(self._head, self._body)
        try:
            await answer.head()
        except (EngineGoneError, asyncio.CancelledError):
            answer.release()
            raise
        return answer

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._answer is not None:
            self._answer.release()


class Pool:
    """The connections to one engine, at `unix:///path`, `http://host:port` or `https://host:port`, a path maybe behind
    it."""

    def __init__(self, url: str, *, keep_alive_s: float) -> None:
        """`keep_alive_s`: how long an unused connection is trusted; below the engine's own, so that none is met while
        it is being closed."""
        self._path = url.removeprefix("unix://") if url.startswith("unix://") else None
        parts = urlsplit(url if self._path is None else "http://engine")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._tls else 80)
        self._name = parts.netloc.rpartition("@")[2].encode("latin-1")
        self._prefix = parts.path.rstrip("/")
        self._keep_alive_s = keep_alive_s
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._heads: dict[tuple[str, str], bytes] = {}
        self._empty = asyncio.Event()
        self.closed = False

    def exchange(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, fresh: bool = False
    ) -> Exchange:
        """A request, not sent yet. `fresh` asks for a connection that was never used."""
        return Exchange(self, self._request_head(method, path, len(body), headers), body, fresh=fresh)

    def _request_head(self, method: str, path: str, body_bytes: int, headers: Mapping[str, str]) -> bytes:
        start = self._heads.get((method, path))
        if start is None:
            # Answers go on to clients as they are, so they must not come compressed.
            lines = f"{method} {self._prefix}{path} HTTP/1.1\r\nhost: ".encode("latin-1") + self._name
            start = self._heads[(method, path)] = lines + b"\r\naccept-encoding: identity\r\ncontent-length: "
        rest = "".join([f"\r\n{name}: {value}" for name, value in headers.items()])
        return b"%b%d%b\r\n\r\n" % (start, body_bytes, rest.encode("latin-1"))

    def take(self) -> Connection | None:
        """An idle connection; the one that was used last."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since_s < self._keep_alive_s:
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """A new connection; EngineGoneError where there is nobody."""
        if self.closed:
            raise EngineGoneError("the engine has gone")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self._path is not None:
                    _, connection = await loop.create_unix_connection(lambda: Connection(self), self._path)
                else:
                    _, connection = await loop.create_connection(
                        lambda: Connection(self), self._host, self._port, ssl=self._tls
                    )
        except TimeoutError:
            raise EngineGoneError(f"the engine takes no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise EngineGoneError(f"the engine cannot be reached: {error}") from error
        if not connection.lost:
            self._all.add(connection)
        return connection

    def put(self, connection: Connection) -> None:
        """A connection is free again."""
        if self.closed:
            connection.abort()
        else:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is lost."""
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if not self._all:
            self._empty.set()

    async def close(self, grace_s: float) -> None:
        """Take no more requests, and break what is still in flight after `grace_s`: it ends with EngineGoneError."""
        self.closed = True
        while self._idle:
            self._idle.pop().abort()
        if self._all:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace_s)
        for connection in list(self._all):
            connection.abort()
