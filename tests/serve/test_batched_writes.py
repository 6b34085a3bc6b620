"""Writes that are gathered: in order, each connection's in one piece, none lost, none to a closed connection."""

import asyncio

from loradock_serve.batched_writes import BatchedWrites, batched_writes


class Recorded(asyncio.Transport):
    def __init__(self, log: list[tuple[str, bytes]], name: str) -> None:
        super().__init__()
        self._log = log
        self._name = name
        self.closing = False

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self._log.append((self._name, data))

    def is_closing(self) -> bool:
        return self.closing


async def test_writes_of_one_turn_go_out_together_in_order() -> None:
    log: list[tuple[str, bytes]] = []
    writes, a, b = batched_writes(), Recorded(log, "a"), Recorded(log, "b")
    for transport, data in ((a, b"1"), (b, b"2"), (a, b"3")):
        writes.write(transport, data)
    assert log == []
    await asyncio.sleep(0)
    assert log == [("a", b"13"), ("b", b"2")]
    writes.write(a, b"4")
    await asyncio.sleep(0)
    assert log[2:] == [("a", b"4")]


async def test_flush_writes_at_once_and_only_once() -> None:
    log: list[tuple[str, bytes]] = []
    writes = BatchedWrites(asyncio.get_running_loop())
    writes.write(Recorded(log, "a"), b"1")
    writes.flush()
    assert log == [("a", b"1")]
    await asyncio.sleep(0)
    assert log == [("a", b"1")]


async def test_connection_that_closed_meanwhile_is_passed_over() -> None:
    log: list[tuple[str, bytes]] = []
    writes, gone, other = batched_writes(), Recorded(log, "gone"), Recorded(log, "other")
    writes.write(gone, b"1")
    writes.write(other, b"2")
    gone.closing = True
    await asyncio.sleep(0)
    assert log == [("other", b"2")]


async def test_one_loop_has_one() -> None:
    assert batched_writes() is batched_writes()
