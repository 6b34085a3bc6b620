"""What each name was made to mean, and when: which versions a request may have been answered by.

A change of a name takes a moment. A request that overlaps it may see the name before or after; one that began when the
change had been confirmed must see it. Knows nothing of HTTP.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REMOVED = None
"""Where a name points when there is none."""


@dataclass
class Change:
    """One change of a name; changes of one name follow one another."""

    began_s: float
    ended_s: float = float("inf")
    number: int | None = REMOVED
    """The version that the name points at from then on."""


class Ledger:
    """All changes of all names, and which checkpoint each version is."""

    def __init__(self) -> None:
        self._changes: dict[str, list[Change]] = defaultdict(list)
        self._directories: dict[tuple[str, int], Path] = {}
        self._digests: dict[tuple[str, int], str] = {}

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[Change]:
        """A change under way; the block sets where the name points once it is confirmed."""
        change = Change(time.monotonic())
        self._changes[name].append(change)
        yield change
        change.ended_s = time.monotonic()

    def published(self, name: str, number: int, directory: Path, digest: str) -> None:
        """A version is these files."""
        known = self._directories.setdefault((name, number), directory)
        assert known == directory, f"{name}@{number} was {known.name} and is {directory.name} now"
        self._digests[name, number] = digest

    def current(self, name: str) -> int | None:
        """Where the name points, as far as that is confirmed."""
        confirmed = self._confirmed(name)
        return confirmed[-1].number if confirmed else REMOVED

    def numbers(self, name: str) -> list[int]:
        """The versions that the name has, the oldest first; those from before a removal are gone."""
        changes = self._confirmed(name)
        removed_s = max((change.ended_s for change in changes if change.number is REMOVED), default=0.0)
        return sorted({change.number for change in changes if change.number and change.began_s >= removed_s})

    def digest(self, name: str, number: int) -> str:
        """As the server named the version's bytes."""
        return self._digests[name, number]

    def directory(self, name: str, number: int) -> Path:
        """The version's files."""
        return self._directories[name, number]

    def allowed(self, name: str, began_s: float, ended_s: float) -> set[int | None]:
        """Where a request between these two moments may have found the name to point."""
        before = [change for change in self._changes[name] if change.ended_s < began_s]
        during = [change for change in self._changes[name] if change.ended_s >= began_s and change.began_s <= ended_s]
        return {before[-1].number if before else REMOVED, *(change.number for change in during)}

    def told(self, name: str) -> str:
        """The name's changes, for a complaint."""
        changes = (f"{change.began_s:.3f} to {change.ended_s:.3f} s: {change.number}" for change in self._changes[name])
        return f"{name} was moved: {', '.join(changes)}"

    def _confirmed(self, name: str) -> list[Change]:
        return [change for change in self._changes[name] if change.ended_s < float("inf")]
