"""One at a time for each key of many: publishes of a name, loads and unloads of an adapter. Knows nothing of either."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator


class Turns:
    """One at a time for each key; a key is kept only while somebody is at it or waits."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._takers: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """This key's turn."""
        self._takers[key] += 1
        try:
            async with self._locks.setdefault(key, asyncio.Lock()):
                yield
        finally:
            self._takers[key] -= 1
            if not self._takers[key]:
                del self._takers[key], self._locks[key]
