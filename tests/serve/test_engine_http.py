"""The HTTP client towards engines, against a peer that says what a test tells it to, in the pieces it chooses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loradock_serve import engine_http
from loradock_serve.engine_http import Answer, EngineGoneError, Exchange, Pool
from loradock_testing.waiting import until

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\n"


def sized(body: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes) -> bytes:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class Peer:
    """Accepts connections; each request is answered with the next of `answers`, written piece by piece."""

    def __init__(self) -> None:
        self.answers: list[list[bytes]] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                for piece in self.answers.pop(0):
                    if piece == b"WAIT":
                        self.go_on.clear()
                        gone = asyncio.create_task(reader.read(1))
                        went_on = asyncio.create_task(self.go_on.wait())
                        await asyncio.wait({gone, went_on}, return_when=asyncio.FIRST_COMPLETED)
                        if gone.done():
                            raise ConnectionError
                        gone.cancel()
                        await asyncio.gather(gone, return_exceptions=True)
                    elif piece == b"CLOSE":
                        writer.close()
                        return
                    else:
                        writer.write(piece)
                        await writer.drain()
        self.hung_up.set()
        writer.close()


@contextlib.asynccontextmanager
async def peer_and_pool(path: Path) -> AsyncIterator[tuple[Peer, Pool]]:
    peer = Peer()
    server = await asyncio.start_unix_server(peer.serve, path)
    pool = Pool(f"unix://{path}", keep_alive_s=60)
    try:
        yield peer, pool
    finally:
        await pool.close(0)
        server.close()


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[tuple[Peer, Pool]]:
    async with peer_and_pool(tmp_path / "peer.sock") as pair:
        yield pair


def post(pool: Pool, body: bytes = b"hello") -> Exchange:
    return pool.exchange("POST", "/v1/x", body, {"x-request-id": "7"})


async def ask(pool: Pool) -> tuple[int, bytes]:
    async with post(pool) as answer:
        return answer.status, await answer.read()


async def test_connection_that_is_lost_before_its_first_request_keeps_nobody_waiting(both: tuple[Peer, Pool]) -> None:
    _, pool = both
    connection = await pool.connect()
    connection.abort()
    await until(lambda: connection.lost, "the loss")
    with pytest.raises(EngineGoneError, match="closed the connection"):
        await asyncio.wait_for(connection.ask(b"", b"").head(), 10)


async def test_request_goes_out_as_it_was_given(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[sized(b"yes")]]
    async with post(pool, b"x" * 300_000) as answer:
        assert (answer.status, answer.content_type) == (200, "text/plain")
        assert await answer.read() == b"yes"
        assert await answer.chunk() == b""
    head, _, body = peer.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/x HTTP/1.1",
        b"host: engine",
        b"accept-encoding: identity",
        b"content-length: 300000",
        b"x-request-id: 7",
    ]
    assert body == b"x" * 300_000


async def test_connection_is_used_again_after_answers_of_every_kind(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    early = b"HTTP/1.1 100 Continue\r\n\r\n"
    peer.answers = [[sized(b"1")], [chunked(b"2", b"3")], [empty], [sized(b"")], [early + sized(b"4")], [sized(b"5")]]
    answers = [await ask(pool) for _ in range(6)]
    assert answers == [(200, b"1"), (200, b"23"), (204, b""), (200, b""), (200, b"4"), (200, b"5")]
    assert peer.connections == 1


async def test_requests_at_the_same_time_have_connections_of_their_own(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[sized(b"1")], [sized(b"2")], [sized(b"3")]]
    async with post(pool) as one, post(pool) as other:
        assert {await one.read(), await other.read()} == {b"1", b"2"}
    await ask(pool)
    assert peer.connections == 2


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (HEAD + b"connection: close\r\ncontent-length: 3\r\n\r\nyes", b"yes"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nyes", b"yes"),
    ],
)
async def test_connection_that_the_engine_will_close_is_not_used_again(
    both: tuple[Peer, Pool], answer: bytes, body: bytes
) -> None:
    peer, pool = both
    peer.answers = [[answer], [sized(b"next")]]
    assert [await ask(pool), await ask(pool)] == [(200, body), (200, b"next")]
    assert peer.connections == 2


async def test_answer_without_a_length_ends_with_the_connection(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[HEAD + b"\r\nall ", b"of it", b"CLOSE"], [sized(b"next")]]
    assert [await ask(pool), await ask(pool)] == [(200, b"all of it"), (200, b"next")]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"CLOSE"],
        [b"HTTP/1.1 200 OK\r\ncontent-len", b"CLOSE"],
        [HEAD + b"content-length: 9\r\n\r\nhalf", b"CLOSE"],
        [chunked(b"half").removesuffix(b"0\r\n\r\n"), b"CLOSE"],
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [HEAD + b"transfer-encoding: chunked\r\n\r\nnot hex\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
    ],
)
async def test_answer_that_breaks_off_is_an_error(both: tuple[Peer, Pool], pieces: list[bytes]) -> None:
    peer, pool = both
    peer.answers = [pieces, [sized(b"next")]]
    with pytest.raises(EngineGoneError):
        await ask(pool)
    assert await ask(pool) == (200, b"next")


async def test_what_came_before_the_break_is_read_first(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[chunked(b"a", b"b").removesuffix(b"0\r\n\r\n"), b"CLOSE"]]
    async with post(pool) as answer:
        got = await answer.chunk()
        while got != b"ab":
            got += await answer.chunk()
        with pytest.raises(EngineGoneError, match="closed the connection"):
            await answer.chunk()


async def test_answer_left_unread_hangs_up_on_the_engine(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[chunked(b"a").removesuffix(b"0\r\n\r\n"), b"WAIT"], [sized(b"next")]]
    async with post(pool) as answer:
        assert await answer.chunk() == b"a"
    await asyncio.wait_for(peer.hung_up.wait(), 10)
    assert await ask(pool) == (200, b"next")


async def test_request_cancelled_before_the_head_hangs_up_on_the_engine(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[b"WAIT"]]
    asking = asyncio.create_task(ask(pool))
    await until(lambda: bool(peer.requests), "the request")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.wait_for(peer.hung_up.wait(), 10)


async def test_engine_that_speaks_unasked_loses_its_connection(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[sized(b"one") + sized(b"two")], [sized(b"next")]]
    assert [await ask(pool), await ask(pool)] == [(200, b"one"), (200, b"next")]
    assert peer.connections == 2


async def test_connection_that_rested_too_long_is_not_trusted(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[sized(b"1")], [sized(b"2")]]
    await ask(pool)
    pool._idle[0].idle_since_s -= 61
    await ask(pool)
    assert peer.connections == 2


async def test_connection_closed_while_it_rested_is_not_met(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[sized(b"1"), b"CLOSE"], [sized(b"2")]]
    await ask(pool)
    await until(lambda: not pool._idle, "the end of the connection")
    assert await ask(pool) == (200, b"2")


async def test_reader_that_is_slow_makes_the_engine_wait(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    piece = b"x" * 65536
    body = piece * 160
    peer.answers = [[HEAD + b"content-length: %d\r\n\r\n" % len(body), *[piece] * 160]]
    async with post(pool) as answer:
        await until(lambda: answer._size >= engine_http.BUFFER_BYTES, "a full buffer")
        for _ in range(100):
            await asyncio.sleep(0)
        assert answer._size < 2 * engine_http.BUFFER_BYTES
        assert await answer.read() == body


async def test_read_with_a_limit_stops_there(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[HEAD + b"content-length: 900000\r\n\r\n", b"x" * 500_000, b"WAIT"]]
    async with post(pool) as answer:
        assert await answer.read(1000) == b"x" * 1000


async def test_engine_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineGoneError, match="cannot be reached"):
        await ask(Pool(f"unix://{tmp_path}/nobody.sock", keep_alive_s=60))
    with pytest.raises(EngineGoneError, match="cannot be reached"):
        await ask(Pool("http://127.0.0.1:9", keep_alive_s=60))


async def test_engine_reached_over_tcp_hears_its_own_name(tmp_path: Path) -> None:
    peer = Peer()
    peer.answers = [[sized(b"yes")]]
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = Pool(f"http://127.0.0.1:{port}/", keep_alive_s=60)
    assert await ask(pool) == (200, b"yes")
    assert b"host: 127.0.0.1:%d\r\n" % port in peer.requests[0]
    await pool.close(0)
    server.close()


async def test_engine_behind_a_path_is_asked_there() -> None:
    peer = Peer()
    peer.answers = [[sized(b"yes")]]
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/engines/7/", keep_alive_s=60)
    assert await ask(pool) == (200, b"yes")
    assert peer.requests[0].split(b" ")[1].startswith(b"/engines/7/")
    await pool.close(0)
    server.close()


async def test_engine_that_is_to_be_reached_over_tls_is_never_asked_in_the_open() -> None:
    heard: list[bytes] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    with pytest.raises(EngineGoneError):
        await ask(Pool(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", keep_alive_s=60))
    assert heard == [b"\x16"]  # a TLS handshake, and not a request line
    server.close()


@pytest.mark.parametrize(
    ("url", "port"), [("http://engine.lan", 80), ("https://engine.lan", 443), ("http://[::1]:81", 81)]
)
def test_port_of_an_engine_is_the_schemes_where_none_is_named(url: str, port: int) -> None:
    assert Pool(url, keep_alive_s=60)._port == port


async def test_closing_lets_answers_end_and_then_breaks_them(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[HEAD + b"content-length: 4\r\n\r\nha", b"WAIT", b"lf"], [b"WAIT"]]
    async with post(pool) as answer:
        closing = asyncio.create_task(pool.close(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineGoneError, match="has gone"):
            await ask(pool)
        assert not closing.done()
        peer.go_on.set()
        assert await answer.read() == b"half"
    await asyncio.wait_for(closing, 10)


async def test_closing_without_grace_ends_what_is_in_flight(both: tuple[Peer, Pool]) -> None:
    peer, pool = both
    peer.answers = [[b"WAIT"]]
    asking = asyncio.create_task(ask(pool))
    await until(lambda: bool(peer.requests), "the request")
    await pool.close(0)
    with pytest.raises(EngineGoneError):
        await asking


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data(), pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6), chunks=st.booleans())
def test_answer_is_the_same_however_the_network_cuts_it(data: st.DataObject, pieces: list[bytes], chunks: bool) -> None:
    whole = chunked(*pieces) if chunks else sized(b"".join(pieces))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert fed(parts, lambda answer: answer.read()) == b"".join(pieces)


def fed(parts: list[bytes], read: Callable[[Answer], Coroutine[Any, Any, bytes]]) -> bytes:
    """What a reader gets from an answer whose bytes arrive in these parts."""

    async def run() -> bytes:
        pool = Pool("unix:///nowhere", keep_alive_s=60)
        connection = engine_http.Connection(pool)
        connection.connection_made(_Nowhere())
        answer = connection.ask(b"", b"")
        reading = asyncio.create_task(read(answer))
        for part in parts:
            connection.data_received(part)
            await asyncio.sleep(0)
        return await reading

    return asyncio.run(run())


class _Nowhere(asyncio.Transport):
    def write(self, data: object) -> None:
        pass
