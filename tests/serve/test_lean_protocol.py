"""The short way of hot requests through uvicorn, byte for byte, on real sockets."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from loradock_serve import lean_protocol
from loradock_serve.lean_protocol import HANG_UP, LeanCycle, LeanProtocol, hot_paths
from loradock_testing.waiting import until


class Protocol(LeanProtocol):
    hot = hot_paths(["/hot"])


class App:
    """Reads the whole body, then answers as its `answer` says; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[Scope, bytes]] = []
        self.hang_ups = 0
        self.may_go_on = asyncio.Event()
        self.disconnects = 0
        self.answer: Callable[[Receive, Send], Any] = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.seen.append((scope, body))
        if HANG_UP in scope.get("extensions", {}):
            scope["extensions"][HANG_UP](self._gone)
        await self.answer(receive, send)

    def _gone(self) -> None:
        self.hang_ups += 1
        self.may_go_on.set()


async def start(send: Send, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def body(send: Send, data: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def whole(_receive: Receive, send: Send) -> None:
    await start(send, (b"content-length", b"3"))
    await body(send, b"yes")


async def pieces(_receive: Receive, send: Send) -> None:
    await start(send)
    for piece in (b"one", b"", b"two"):
        await body(send, piece, more=True)
    await body(send, b"")


class Client:
    """One connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, head: str, data: bytes = b"", *, length: bool = True) -> tuple[str, bytes]:
        self.write(head, data, length=length)
        return await self.answer()

    def write(self, head: str, data: bytes = b"", *, length: bool = True) -> None:
        announced = f"content-length: {len(data)}\r\n" if length else ""
        self.writer.write(f"{head}\r\nhost: x\r\n{announced}\r\n".encode() + data)

    async def answer(self) -> tuple[str, bytes]:
        """Head, and body without its chunks."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("HTTP/1.1 100 "):
            return await self.answer()
        if "content-length: " in head:
            return head, await self.reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
        data = b""
        while size := int(await self.reader.readline(), 16):
            data += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return head, data


@contextlib.asynccontextmanager
async def serving(app: App, **config: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    settings = uvicorn.Config(
        app, http=Protocol, port=0, lifespan="off", log_config=None, server_header=False, **config
    )
    server = uvicorn.Server(settings)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started, "the server")
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


@contextlib.asynccontextmanager
async def connected(app: App, **config: Any) -> AsyncIterator[Client]:
    async with serving(app, **config) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()


def was_lean(app: App, number: int = -1) -> bool:
    return HANG_UP in app.seen[number][0].get("extensions", {})


POST = "POST /hot HTTP/1.1"


async def test_requests_are_gone_when_they_are_answered_without_the_garbage_collector() -> None:
    cycles: list[weakref.ref[LeanCycle]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        cycles.append(weakref.ref(cast(Any, send).__self__))
        scope["extensions"][HANG_UP](lambda: cast(Any, send)({}))  # who is told of the end writes the answer, mostly
        await start(send, (b"content-length", b"3"))
        await body(send, b"yes")

    gc.disable()
    try:
        async with connected(cast(Any, app)) as client:
            for _ in range(3):
                assert (await client.ask(POST))[1] == b"yes"
            assert [cycle() is None for cycle in cycles] == [True, True, False]  # a connection knows its latest
    finally:
        gc.enable()


async def test_whole_answers_follow_each_other_on_one_connection() -> None:
    app = App()
    async with connected(app) as client:
        for data in (b"first", b"", b"third"):
            head, answer = await client.ask(POST, data)
            assert head.startswith("HTTP/1.1 200 OK\r\ndate: ")
            assert answer == b"yes"
    assert [data for _, data in app.seen] == [b"first", b"", b"third"]
    scope = app.seen[0][0]
    assert (scope["method"], scope["path"], scope["raw_path"], scope["query_string"]) == ("POST", "/hot", b"/hot", b"")
    assert (b"host", b"x") in scope["headers"]
    assert was_lean(app)


async def test_answer_without_a_length_goes_out_in_chunks() -> None:
    app = App()
    app.answer = pieces
    async with connected(app) as client:
        head, answer = await client.ask(POST)
        assert "transfer-encoding: chunked\r\n" in head
        assert answer == b"onetwo"
        assert (await client.ask(POST))[1] == b"onetwo"


@pytest.mark.parametrize("extra", ["", "\r\nconnection: keep-alive", "\r\nconnection: close"])
@pytest.mark.parametrize(("answer", "body_bytes"), [(pieces, b"onetwo"), (None, b"yes")])
async def test_client_of_http_1_0_gets_no_chunks_and_reads_to_the_end_of_its_connection(
    answer: Any, body_bytes: bytes, extra: str
) -> None:
    app = App()
    if answer is not None:
        app.answer = answer
    async with connected(app) as client:
        client.write("POST /hot HTTP/1.0" + extra, b"question")
        head, _, data = (await client.reader.read()).partition(b"\r\n\r\n")
    assert data == body_bytes
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert [asked for _, asked in app.seen] == [b"question"]
    assert app.seen[0][0]["http_version"] == "1.0"
    assert was_lean(app)


async def test_body_that_comes_in_pieces_is_read_whole() -> None:
    app = App()
    data = b"x" * 3_000_000
    async with connected(app) as client:
        client.writer.write(b"POST /hot HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n")
        for at in range(0, len(data), 500_000):
            await client.writer.drain()
            await asyncio.sleep(0.01)
            client.writer.write(data[at : at + 500_000])
        assert (await client.answer())[1] == b"yes"
        client.writer.write(b"POST /hot HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.writer.write(b"2\r\nde\r\n0\r\n\r\n")
        assert (await client.answer())[1] == b"yes"
    assert [data for _, data in app.seen] == [data, b"abcde"]
    assert was_lean(app)


@pytest.mark.parametrize(
    "head",
    [
        "POST /other HTTP/1.1",
        "POST /hot?x=1 HTTP/1.1",
        "PUT /hot HTTP/1.1",
        "POST /hot HTTP/1.1\r\nexpect: 100-continue",
        "POST /hot HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c",
    ],
)
async def test_what_is_unusual_goes_uvicorns_own_way(head: str) -> None:
    app = App()
    async with connected(app) as client:
        assert (await client.ask(head, b"q"))[1] == b"yes"
    assert not was_lean(app)


OFFER = "\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c"


@pytest.mark.parametrize("path", ["/hot", "/other"])
async def test_request_that_offers_http2_keeps_its_body_and_is_answered_in_http1(path: str) -> None:
    app = App()
    async with connected(app) as client:
        for data in (b"first", b"second"):
            head, answer = await client.ask(f"POST {path} HTTP/1.1{OFFER}", data)
            assert (head.split("\r\n")[0], answer) == ("HTTP/1.1 200 OK", b"yes")
    assert [data for _, data in app.seen] == [b"first", b"second"]
    assert was_lean(app) == (path == "/hot")


async def test_body_that_looks_like_an_offer_of_http2_stays_as_it_is() -> None:
    app = App()
    text = (POST + OFFER).encode() + b"\r\n\r\n"
    async with serving(app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /hot HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(text))
        await asyncio.sleep(0)  # the head alone
        writer.write(text)
        await Client(reader, writer).answer()
        writer.close()
    assert [data for _, data in app.seen] == [text]


async def test_requests_sent_ahead_are_answered_in_order() -> None:
    app = App()
    async with connected(app) as client:
        for data in (b"1", b"2", b"3"):
            client.write(POST, data)
        assert [(await client.answer())[1] for _ in range(3)] == [b"yes"] * 3
        assert (await client.ask(POST, b"4"))[1] == b"yes"
    assert [data for _, data in app.seen] == [b"1", b"2", b"3", b"4"]


async def hold(receive: Receive, send: Send) -> None:
    await start(send)
    await body(send, b"begun", more=True)
    assert (await receive())["type"] == "http.disconnect"
    await body(send, b"nobody reads this", more=True)
    await body(send, b"")


async def test_hang_up_is_told_once_and_ends_receive() -> None:
    app = App()
    app.answer = hold
    async with serving(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        client.write(POST)
        await reader.readuntil(b"begun")
        writer.close()
        await until(lambda: app.hang_ups == 1, "the hang-up")
        await until(lambda: not server.server_state.tasks, "the end of the request")
    assert app.hang_ups == 1


async def wait_for_hang_up(receive: Receive, send: Send, app: App) -> None:
    await app.may_go_on.wait()
    await whole(receive, send)


async def test_hang_up_after_a_large_body_is_told() -> None:
    app = App()
    app.answer = lambda receive, send: wait_for_hang_up(receive, send, app)
    async with serving(app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        Client(reader, writer).write(POST, b"x" * 1_000_000)
        await until(lambda: bool(app.seen), "the request")
        writer.close()
        await until(lambda: app.hang_ups == 1, "the hang-up")


async def pour(_receive: Receive, send: Send) -> None:
    await start(send)
    for _ in range(1000):
        await body(send, b"x" * 100_000, more=True)
    await body(send, b"")


@pytest.mark.parametrize("head", [POST, "POST /other HTTP/1.1"])
async def test_client_that_takes_nothing_any_more_is_let_go(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_protocol, "STALLED_S", 0.05)
    app = App()
    app.answer = pour
    async with serving(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        Client(reader, writer).write(head)
        await until(lambda: bool(app.seen), "the request")
        await until(lambda: not server.server_state.tasks, "the end of the request")
        await until(lambda: not server.server_state.connections, "the end of the connection")
        writer.close()


async def test_client_that_reads_slowly_gets_its_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_protocol, "STALLED_S", 3600.0)  # it is looked by hand, whenever some of it was read
    size = 30_000_000  # more than sockets hold for a reader, so that some waits when it is looked for progress

    async def large(_receive: Receive, send: Send) -> None:
        await start(send, (b"content-length", b"%d" % size))
        await body(send, b"x" * size)

    app = App()
    app.answer = large
    async with serving(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=100_000)
        Client(reader, writer).write(POST)
        await reader.readuntil(b"\r\n\r\n")
        (connection,) = cast(Any, server.server_state.connections)
        got = looks = 0
        while got < size:
            got += len(await reader.readexactly(min(2_000_000, size - got)))
            timer = connection._stall_timer
            if timer is not None and connection.transport.get_write_buffer_size() < connection._unsent_bytes:
                timer.cancel()
                connection._look_for_progress()
                looks += 1
        assert got == size
        assert looks > 1
        writer.close()


async def test_hang_up_after_the_answer_is_not_told() -> None:
    app = App()
    async with serving(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await Client(reader, writer).ask(POST))[1] == b"yes"
        writer.close()
        await until(lambda: not server.server_state.connections, "the end of the connection")
    assert app.hang_ups == 0


async def fail(_receive: Receive, _send: Send) -> None:
    raise LookupError("broken")


async def fail_late(_receive: Receive, send: Send) -> None:
    await start(send)
    await body(send, b"begun", more=True)
    raise LookupError("broken")


async def forget(_receive: Receive, send: Send) -> None:
    await start(send)
    await body(send, b"begun", more=True)


async def split_header(_receive: Receive, send: Send) -> None:
    await start(send, (b"content-length", b"0"), (b"x", b"a\r\nset-cookie: b"))


async def test_application_that_fails_is_a_500_and_the_end_of_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    for answer in (fail, split_header):
        app = App()
        app.answer = answer
        async with connected(app) as client:
            head, data = await client.ask(POST)
            assert head.startswith("HTTP/1.1 500 ")
            assert "connection: close\r\n" in head
            assert "set-cookie" not in head
            assert data == b"Internal Server Error"
            assert await client.reader.read() == b""
        assert "Exception in ASGI application" in caplog.text


@pytest.mark.parametrize("answer", [fail_late, forget])
async def test_answer_that_stops_short_breaks_the_connection(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    app.answer = answer
    async with connected(app) as client:
        client.write(POST)
        data = await client.reader.read()
        assert data.endswith(b"5\r\nbegun\r\n")  # and no last chunk
    assert caplog.text


@pytest.mark.parametrize("length", [b"2", b"4"])
async def test_length_that_is_not_kept_is_an_error(length: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def lies(_receive: Receive, send: Send) -> None:
        await start(send, (b"content-length", length))
        await body(send, b"yes")

    app = App()
    app.answer = lies
    async with connected(app) as client:
        client.write(POST)
        assert await client.reader.read() == b""
    assert "not as long as its content-length" in caplog.text


async def test_idle_connection_is_closed() -> None:
    async with connected(App(), timeout_keep_alive=0.1) as client:
        assert (await client.ask(POST))[1] == b"yes"
        assert await asyncio.wait_for(client.reader.read(), 60) == b""


async def test_busy_connection_is_not_closed_when_the_time_of_an_idle_one_is_over() -> None:
    app = App()

    async def wait(receive: Receive, send: Send) -> None:
        await app.may_go_on.wait()
        await whole(receive, send)

    async with serving(app, timeout_keep_alive=3600) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        assert (await client.ask(POST))[1] == b"yes"  # from now on there is a timer
        app.answer = wait
        client.write(POST)
        await until(lambda: len(app.seen) == 2, "the request")
        (connection,) = cast(Any, server.server_state.connections)
        connection.timeout_keep_alive_task.cancel()
        connection.timeout_keep_alive_handler()
        app.may_go_on.set()
        assert (await client.answer())[1] == b"yes"
        writer.close()


async def test_connection_that_the_client_wants_closed_is_closed() -> None:
    app = App()
    async with connected(app) as client:
        head, answer = await client.ask(POST + "\r\nconnection: close")
        assert ("connection: close\r\n" in head, answer) == (True, b"yes")
        assert await client.reader.read() == b""
    assert was_lean(app)


async def test_stopping_server_lets_an_answer_end() -> None:
    app = App()

    async def wait(_receive: Receive, send: Send) -> None:
        await app.may_go_on.wait()
        await whole(_receive, send)

    app.answer = wait
    async with serving(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        client.write(POST)
        await until(lambda: bool(app.seen), "the request")
        server.should_exit = True
        await until(lambda: not server.servers[0].is_serving(), "the stop")
        app.may_go_on.set()
        head, answer = await client.answer()
        assert ("connection: close\r\n" in head, answer) == (True, b"yes")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_reader_that_is_slow_makes_the_application_wait() -> None:
    app = App()
    sent = 0

    async def flood(_receive: Receive, send: Send) -> None:
        nonlocal sent
        await start(send)
        while sent < 400:
            await body(send, b"x" * 65536, more=True)
            sent += 1
            await asyncio.sleep(0)
        await body(send, b"")

    app.answer = flood
    async with connected(app) as client:
        client.write(POST)
        await until(lambda: bool(app.seen), "the request")
        await asyncio.sleep(0.3)
        assert sent < 400
        assert len((await client.answer())[1]) == 400 * 65536


async def test_what_is_no_http_is_refused() -> None:
    async with connected(App()) as client:
        client.writer.write(b"NONSENSE\r\n\r\n")
        assert (await client.reader.readline()).startswith(b"HTTP/1.1 400 ")
