"""What a request holds while it is answered, as context managers made by hand.

These are on the way of every request, and a generator of contextlib costs as much as what it does. The fleet decides;
nothing here knows engines.
"""

import contextlib
from collections import Counter
from types import TracebackType
from typing import NamedTuple, Protocol

from loradock_adapters.registry import Version
from loradock_serve.engine import AttachedEngine, Engine
from loradock_serve.engine_client import EngineClient


class Target(NamedTuple):
    """Where a request goes."""

    client: EngineClient
    engine_model: str
    """What the engine calls the model: a digest, or `base`."""
    engine: Engine | AttachedEngine
    start_number: int


class Shares(Protocol):
    """Who lends the base's engine."""

    async def enter_shared(self, version: Version | None, hold_s: float) -> Target:
        """The engine, ready, with the adapter loaded; None is the base itself."""

    def leave_shared(self, version: Version | None) -> None:
        """It is given back."""


class SharedLease:
    """A lease of the base's engine."""

    def __init__(self, fleet: Shares, version: Version | None, hold_s: float) -> None:
        self._fleet = fleet
        self._version = version
        self._hold_s = hold_s

    async def __aenter__(self) -> Target:
        return await self._fleet.enter_shared(self._version, self._hold_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fleet.leave_shared(self._version)


class Counted:
    """Counts one more of a key as long as the block runs."""

    def __init__(self, counts: Counter[str], key: str) -> None:
        self._counts = counts
        self._key = key

    def __enter__(self) -> None:
        self._counts[self._key] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counts[self._key] -= 1
        if not self._counts[self._key]:
            del self._counts[self._key]


NOTHING = contextlib.nullcontext()
