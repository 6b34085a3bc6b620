"""A heap of items whose keys change: what is outdated stays in it until it comes to the top, or is half of it."""

from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Key = tuple[Any, ...]
SLACK = 64


class LazyHeap(Generic[T]):
    """The item with the smallest key first; of equal keys, the one put in first. Items are told apart by identity."""

    __slots__ = ("_entries", "_heap", "_number")

    def __init__(self) -> None:
        self._entries: dict[T, tuple[Key, int, T]] = {}
        self._heap: list[tuple[Key, int, T]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def put(self, item: T, key: Key) -> None:
        """Add an item, or give it another key."""
        old = self._entries.get(item)
        if old is not None and old[0] == key:
            return
        self._number += 1
        entry = (key, self._number, item)
        self._entries[item] = entry
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def drop(self, item: T) -> None:
        """Take an item out, if it is in."""
        self._entries.pop(item, None)

    def first(self) -> T | None:
        """The item with the smallest key; None where there is none."""
        entry = self._first()
        return None if entry is None else entry[2]

    def first_key(self) -> Key | None:
        """The smallest key; None where there is none."""
        entry = self._first()
        return None if entry is None else entry[0]

    def _first(self) -> tuple[Key, int, T] | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry
            heappop(heap)
        return None
