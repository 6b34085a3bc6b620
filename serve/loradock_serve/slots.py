"""Which adapters an engine may run at this moment: never more than it has slots, counting the pinned ones always.

    waiting ──take──▶ open ──close──▶ closed ──last request ends──▶ waiting
       ▲               │ ▲               │
       └── evicted ────┘ └─── reopen ────┘

An open adapter's requests go as they come. One whose last request ended stays open, idle, until another adapter needs
its slot. A closed one is being drained: what runs on it may end, nothing more begins. Knows nothing of requests,
tenants or time but the times it is told.
"""

import sys
from collections.abc import Callable
from typing import Literal

Place = Literal["open", "waiting", "gathering", "closed"]
UNLIMITED = sys.maxsize


class Adapter:
    """An adapter that somebody waits for, runs on or pinned. Compared by identity. The base's name is None."""

    __slots__ = ("last_begun_at", "name", "pinned", "place", "queued", "running")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.place: Place = "open" if name is None else "waiting"
        self.running = 0
        self.queued = 0
        self.pinned = False
        self.last_begun_at = 0.0
        """When its latest request began: of several, the one with the oldest is likely to be drained first."""


class Slots:
    """The slots of one start of an engine. `moved` is told of each adapter whose place changed while it is waited
    for."""

    def __init__(self, count: int, moved: Callable[[Adapter], None]) -> None:
        self.count = count
        self.pinned = 0
        self.closing: dict[Adapter, None] = {}
        self._adapters: dict[str | None, Adapter] = {}
        self._holders: dict[Adapter, None] = {}
        self._idle: dict[Adapter, None] = {}
        self._moved = moved
        self.base = Adapter(None)

    @property
    def available(self) -> int:
        """How many adapters could take a slot at once."""
        return self.count - len(self._holders) + len(self._idle)

    @property
    def are_scarce(self) -> bool:
        """Whether more adapters are wanted than there are slots."""
        return len(self._adapters) - len(self._idle) > self.count

    def adapter(self, name: str | None) -> Adapter:
        """The adapter of this name, made if need be; `let_go` when it may be of no more use."""
        if name is None:
            return self.base
        adapter = self._adapters.get(name)
        if adapter is None:
            adapter = self._adapters[name] = Adapter(name)
        return adapter

    def take(self, adapter: Adapter) -> None:
        """Give a slot to an adapter that has none; there must be one available."""
        if adapter in self._holders:
            self.reopen(adapter)
            return
        if len(self._holders) >= self.count:
            self._evict(next(iter(self._idle)))
        self._holders[adapter] = None
        self._idle[adapter] = None  # until its first request begins, or it is pinned
        self._move(adapter, "open")

    def begins(self, adapter: Adapter, at: float) -> None:
        """One more request runs on an open adapter."""
        adapter.running += 1
        adapter.last_begun_at = at
        if adapter.running == 1:
            self._idle.pop(adapter, None)

    def ended(self, adapter: Adapter) -> None:
        """One request less runs on it; the end of the last one frees the slot, at once or when it is needed."""
        adapter.running -= 1
        if not adapter.running and not adapter.pinned and adapter.name is not None:
            self._rest(adapter)

    def victims(self) -> list[Adapter]:
        """The adapters that could be closed."""
        return [holder for holder in self._holders if holder.running and not holder.pinned and holder.place == "open"]

    def close(self, adapter: Adapter) -> None:
        """Begin to drain a slot."""
        self.closing[adapter] = None
        self._move(adapter, "closed")

    def reopen(self, adapter: Adapter) -> None:
        """Drain it no longer."""
        self.closing.pop(adapter, None)
        self._move(adapter, "open")

    def pin(self, adapter: Adapter) -> None:
        """Count an open adapter for ever."""
        adapter.pinned = True
        self.pinned += 1
        self._idle.pop(adapter, None)

    def unpin(self, adapter: Adapter) -> None:
        """As any other from now on."""
        adapter.pinned = False
        self.pinned -= 1
        if not adapter.running:
            self._rest(adapter)

    def gather(self, adapter: Adapter, gathers: bool) -> None:
        """Have a waiting adapter gather requests for a while, or be done with it."""
        self._move(adapter, "gathering" if gathers else "waiting")

    def let_go(self, adapter: Adapter) -> None:
        """Forget an adapter that nobody waits for and that holds no slot."""
        if adapter not in self._holders and not adapter.queued and self._adapters.get(adapter.name) is adapter:
            del self._adapters[adapter.name]

    def _rest(self, adapter: Adapter) -> None:
        if adapter.place == "closed" or self.count == UNLIMITED:
            self._evict(adapter)
        else:
            self._idle[adapter] = None

    def _evict(self, adapter: Adapter) -> None:
        self._idle.pop(adapter, None)
        self.closing.pop(adapter, None)
        del self._holders[adapter]
        self._move(adapter, "waiting")
        self.let_go(adapter)

    def _move(self, adapter: Adapter, place: Place) -> None:
        if adapter.place != place:
            adapter.place = place
            if adapter.queued:
                self._moved(adapter)
