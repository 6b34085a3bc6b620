"""Writes to sockets, gathered over one turn of the event loop and then done one after the other.

A write wakes the process at the other end, and where cores are few it runs at once in the writer's place: request for
request, two context switches. Gathered, the first write wakes it and the others find it at work; and what one
connection is sent in several pieces goes out in one. Costs a connection that is alone one turn of the loop, which
is microseconds. Knows nothing of what is written.
"""

import asyncio
import weakref


class BatchedWrites:
    """The writes of one event loop that are still to be done."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[asyncio.Transport, list[bytes]] = {}

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write to a transport, in order, within this turn of the loop or at the beginning of the next."""
        pieces = self._waiting.get(transport)
        if pieces is not None:
            pieces.append(data)
            return
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting[transport] = [data]

    def flush(self) -> None:
        """Do all that waits. Also to be called before a transport is closed that may have something waiting."""
        waiting, self._waiting = self._waiting, {}
        for transport, pieces in waiting.items():
            if not transport.is_closing():
                transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))


_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, BatchedWrites] = weakref.WeakKeyDictionary()


def batched_writes() -> BatchedWrites:
    """Those of the running event loop."""
    loop = asyncio.get_running_loop()
    writes = _of_loops.get(loop)
    if writes is None:
        writes = _of_loops[loop] = BatchedWrites(loop)
    return writes
