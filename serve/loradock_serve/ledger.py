"""What this gateway saw of each adapter since it started: who asked, whether the engine had it, how long loads took.

One owner of these figures. Recording costs a few dictionary look-ups, since it happens for every request; nothing here
waits for anything. Does not know engines, nor where figures are kept (`traffic_record.py`, `metrics.py`).
"""

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from loradock_adapters.traffic import HourTraffic
from loradock_serve import metrics

MAX_ADAPTERS = 10_000
"""Adapters that are remembered; of more, the one that was not seen for longest is forgotten."""
MAX_DIGESTS_AN_HOUR = 10_000
"""Adapters whose requests are counted in one hour until the counts are taken; requests to others are left out."""
LOAD_BUCKETS_S = metrics.LOAD_BUCKETS_S


@dataclass
class Entry:
    """One adapter."""

    hits: int = 0
    """Requests that found it loaded in the engine."""
    misses: int = 0
    """Requests that had to wait for its load."""
    last_used_s: float | None = None
    """When its last request came, in seconds since 1970."""
    loads: int = 0
    """Times the engine was told to load it."""
    load_s: float = 0.0
    """All of them together."""
    last_load_s: float | None = None
    by_duration: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BUCKETS_S) + 1))
    """How many loads took up to each of LOAD_BUCKETS_S, and longer than all."""

    def to_json(self) -> dict[str, Any]:
        """As `GET /v1/adapters/{name}` shows it."""
        used = datetime.fromtimestamp(self.last_used_s, UTC).isoformat() if self.last_used_s is not None else None
        bounds = [f"{bound:g}" for bound in LOAD_BUCKETS_S] + ["+Inf"]
        return {
            "hits": self.hits,
            "misses": self.misses,
            "last_used_at": used,
            "loads": self.loads,
            "last_load_seconds": self.last_load_s,
            "load_seconds": {"sum": self.load_s, "counts": dict(zip(bounds, self.by_duration, strict=True))},
        }


class Ledger:
    """See the top of the file. `clock` tells seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._hour = 0
        self._requests: dict[str, int] = {}
        self._peak = 0
        self._past: list[HourTraffic] = []

    def of(self, digest: str) -> Entry:
        """What is known of an adapter; an empty entry where that is nothing."""
        return self._entries.get(digest) or Entry()

    def requested(self, digest: str, name: str, in_flight: int, *, hit: bool) -> None:
        """A request came for an adapter; `in_flight` adapters have requests now, this one included."""
        now_s = self._clock()
        entry = self._entry(digest)
        entry.last_used_s = now_s
        if hit:
            entry.hits += 1
        else:
            entry.misses += 1
        metrics.count_adapter_request(name, hit=hit)
        hour = int(now_s) // 3600
        if hour != self._hour:
            self._turn_over(hour)
        if digest in self._requests:
            self._requests[digest] += 1
        elif len(self._requests) < MAX_DIGESTS_AN_HOUR:
            self._requests[digest] = 1
        if in_flight > self._peak:
            self._peak = in_flight

    def loaded(self, digest: str, seconds: float) -> None:
        """The engine took so long to load an adapter."""
        metrics.ADAPTER_LOAD_SECONDS.observe(seconds)
        entry = self._entry(digest)
        entry.loads += 1
        entry.load_s += seconds
        entry.last_load_s = seconds
        entry.by_duration[bisect_left(LOAD_BUCKETS_S, seconds)] += 1

    def take_traffic(self) -> list[HourTraffic]:
        """What was asked since the last time, hour by hour; counting goes on from nothing."""
        self._turn_over(self._hour)
        taken, self._past = self._past, []
        return taken

    def give_back(self, traffic: list[HourTraffic]) -> None:
        """Take back what could not be written, for the next time."""
        self._past = [*traffic, *self._past]

    def _entry(self, digest: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = Entry()
            if len(self._entries) > MAX_ADAPTERS:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(digest)
        return entry

    def _turn_over(self, hour: int) -> None:
        if self._requests:
            self._past.append(HourTraffic(self._hour, self._requests, self._peak))
        self._hour, self._requests, self._peak = hour, {}, 0
