"""What unknown names may cost: answers that are remembered for a while, and a bucket of lookups that fills slowly.

Pure: both are told the time by a clock that is handed to them. Bounded, since clients choose the keys.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")
Clock = Callable[[], float]


class Remembered(Generic[Kept]):
    """The newest answers, each until its time is over."""

    def __init__(self, max_entries: int, clock: Clock = time.monotonic) -> None:
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[str, tuple[Kept, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, value: Kept, ttl_s: float) -> None:
        """Keeps an answer; the oldest one goes where there is no room."""
        self._entries.pop(key, None)
        self._entries[key] = (value, self._clock() + ttl_s)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def get(self, key: str) -> tuple[Kept, float] | None:
        """An answer and the seconds that it still holds; None where there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, until = entry
        left_s = until - self._clock()
        if left_s <= 0:
            del self._entries[key]
            return None
        return value, left_s

    def drop(self, key: str) -> None:
        """Forgets an answer, if it is there."""
        self._entries.pop(key, None)


class Bucket:
    """So many a minute, and no more than a minute's worth at once."""

    def __init__(self, a_minute: int, clock: Clock = time.monotonic) -> None:
        self._a_second = a_minute / 60
        self._most = float(a_minute)
        self._clock = clock
        self._left = self._most
        self._seen_at = clock()

    def take(self) -> float:
        """0 where one may go now; else the seconds until the next one may, and none is taken."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen_at) * self._a_second)
        self._seen_at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._a_second
