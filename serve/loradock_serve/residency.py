"""Where each adapter is: in a slot, in the engine's host memory, on this machine's disk, or only elsewhere.

The engine knows the first two and says so on its status route, which costs a call inside its loop: it is asked at most
once a second, by whoever wants to know (`/metrics`, `/v1/adapters`), never on a request's way, and nobody waits long
for an engine that is busy. Changes nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loradock_serve import metrics
from loradock_serve.errors import EngineError
from loradock_serve.fleet import Fleet

log = logging.getLogger("loradock.gateway")

Place = Literal["slot", "cpu", "disk", "remote"]
PLACES: tuple[Place, ...] = ("slot", "cpu", "disk", "remote")
FRESH_S = 1.0
WAIT_S = 0.5
"""How long a question waits for the engine's answer; then the last one has to do."""


@dataclass(frozen=True)
class Look:
    """What the engine said of its adapters, at one moment. Without an engine: nothing."""

    at_s: float
    """Monotonic time."""
    start_number: int = 0
    slots: int = 0
    in_slots: frozenset[str] = frozenset()
    in_memory: frozenset[str] = frozenset()
    """In host memory, whether vLLM has registered them already or they were read ahead."""
    pinned: frozenset[str] = frozenset()
    counts: Mapping[str, int] = field(default_factory=dict)
    """`reads`, `activations`, `slot_evictions`, `cpu_evictions` of all adapters since the engine's start."""
    adapters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The same for each adapter."""

    @classmethod
    def of(cls, at_s: float, start_number: int, status: Mapping[str, Any]) -> "Look":
        """From the status document; an engine with an older plug-in, or none, leaves fields out."""
        return cls(
            at_s,
            start_number,
            len(status.get("active", ())),
            frozenset(name for name in status.get("active", ()) if name is not None),
            frozenset([*status.get("loaded", ()), *status.get("staged", ())]),
            frozenset(status.get("pinned", ())),
            status.get("counts", {}),
            status.get("adapters", {}),
        )


class Residency:
    """See the top of the file. `is_stored` tells whether this machine's disk has a version's bytes."""

    def __init__(
        self, fleet: Fleet, is_stored: Callable[[str], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet = fleet
        self._is_stored = is_stored
        self._clock = clock
        self._last = Look(-FRESH_S)
        self._asking: asyncio.Task[None] | None = None

    async def look(self) -> Look:
        """At most a second old, or older where the engine does not answer soon; empty while there is no engine."""
        current = self._fleet.base.current
        if current is None or current.number != self._last.start_number:
            self._last = Look(self._clock() - FRESH_S, current.number if current is not None else 0)
        if current is not None and self._clock() - self._last.at_s >= FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(), name="residency")
            await asyncio.wait([self._asking], timeout=WAIT_S)
        return self._last

    def age_s(self, look: Look) -> float:
        """How old a look is."""
        return max(0.0, self._clock() - look.at_s)

    def place(self, look: Look, digest: str) -> Place:
        """Where an adapter is. Asks the disk where the engine does not have it."""
        if digest in look.in_slots:
            return "slot"
        if digest in look.in_memory:
            return "cpu"
        return "disk" if self._is_stored(digest) else "remote"

    async def _ask(self) -> None:
        start = self._fleet.base.current
        if start is None:
            return
        try:
            status = await start.client.status()
        except EngineError as error:
            log.info("where adapters are is not known: %s", error)
            return
        look = Look.of(self._clock(), start.number, status.limits if status is not None else {})
        metrics.count_engine(self._last.counts if self._last.start_number == start.number else {}, look.counts)
        self._last = look
