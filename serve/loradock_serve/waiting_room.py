"""Bounds on what waits in the gateway, whatever it waits for: an engine that starts, an adapter that is read, a turn.

Admission bounds the queue of an engine that is ready. Before it stand those whose engine is not, for minutes perhaps;
and whoever waits holds its body in memory. Knows nothing of engines, adapters or turns.
"""

from types import TracebackType
from typing import Self

from loradock_serve import metrics
from loradock_serve.errors import QueueFullError

RETRY_AFTER_S = 5
"""Nobody knows when an engine will have started; a client that asks again so much later costs nothing."""


class Place:
    """One request's place: a context manager, which gives it back in the end."""

    def __init__(self, room: "WaitingRoom", size_bytes: int) -> None:
        self._room = room
        self._size_bytes = size_bytes
        self._before_engine = self._waits = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self) -> None:
        """It waits for its engine. QueueFullError where there is no room."""
        self._room.check(self._size_bytes)
        self._room.before_engine += 1
        self._room.waiting_bytes += self._size_bytes
        self._before_engine = self._waits = True

    def reach_engine(self) -> None:
        """Its engine is ready and has its adapter: the engine's own queue counts it from now on."""
        if self._before_engine:
            self._room.before_engine -= 1
            self._before_engine = False

    def leave(self) -> None:
        """It waits no more. Harmless when said twice."""
        self.reach_engine()
        if self._waits:
            self._room.waiting_bytes -= self._size_bytes
            self._waits = False


class WaitingRoom:
    """See the top of the file. One event loop's, so without locks."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.before_engine = 0
        """Requests whose engine, or adapter, is not ready."""
        self.waiting_bytes = 0
        """Their bodies, and those of the requests that wait for a turn."""

    def place(self, size_bytes: int) -> Place:
        """A place for a body of this size, not taken yet."""
        return Place(self, size_bytes)

    def check(self, size_bytes: int) -> None:
        """QueueFullError where one request more would be too many."""
        if self.before_engine >= self._max_requests:
            raise self._full(
                "queue_full",
                f"{self.before_engine} requests wait for engines or adapters that are not ready, and at most "
                f"{self._max_requests} may (`admission.max_queue`)",
            )
        if self.waiting_bytes and self.waiting_bytes + size_bytes > self._max_bytes:
            raise self._full(
                "queue_bytes_full",
                f"the bodies of the requests that wait are {self.waiting_bytes} bytes, and with these {size_bytes} "
                f"they would be more than {self._max_bytes} (`admission.max_queue_gib`)",
            )

    def _full(self, code: str, message: str) -> QueueFullError:
        metrics.NOT_ADMITTED.labels(code).inc()
        return QueueFullError(f"{message}; try again in {RETRY_AFTER_S} s", code=code, retry_after_s=RETRY_AFTER_S)
