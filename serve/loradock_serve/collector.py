"""Frees the disk of what no name has any more: versions' files, their merges and packed forms, and contents.

A version's files go only when no name has it, no request is answered with it, no publish is at it, and no engine may
read them: vLLM dies when an adapter that it evicted is gone from the disk (the base's engine is asked what it has, and
told to forget it first). A content goes when no version needs it and nobody waits to publish it. What is in
doubt stays, with the reason. Knows nothing of HTTP requests.
"""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import Uploads
from loradock_serve.turns import Turns

log = logging.getLogger("loradock.publish")

MAX_LISTED = 1000
"""Versions and reasons of each kind that a report lists."""


class Users(Protocol):
    """Whoever reads versions' files (`fleet.py`)."""

    def use_of(self, digest: str) -> str | None:
        """What needs the files of a version at this moment, in words; None where nothing does."""

    async def engine_names(self) -> Collection[str] | None:
        """What the base's engine may read from the disk; None where it does not say. A name that is no digest is an
        adapter which it still runs requests on after it was told to forget it."""

    async def let_go(self, digest: str) -> None:
        """Have the base's engine forget an adapter."""


class Copies(Protocol):
    """Merges and packed forms: what can be made again from a version's files."""

    def __call__(self) -> Mapping[str, list[Path]]:
        """The directories, by the version's digest."""


@dataclass
class Collected:
    """What a collection freed, or would free."""

    dry_run: bool
    versions: list[str] = field(default_factory=list)
    """Digests."""
    copies: int = 0
    """Merges and packed forms."""
    contents: int = 0
    freed_bytes: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    """Digest -> why its files stay although no name has it."""

    def to_json(self) -> dict[str, Any]:
        """As the HTTP API answers it."""
        kept = [{"digest": digest, "why": why} for digest, why in list(self.kept.items())[:MAX_LISTED]]
        return {
            "dry_run": self.dry_run,
            "freed_bytes": self.freed_bytes,
            "versions": len(self.versions),
            "copies": self.copies,
            "contents": self.contents,
            "digests": self.versions[:MAX_LISTED],
            "kept": kept,
        }


class Collector:
    """See the top of the file. `turns` are those of whoever publishes: nothing is collected while it is published."""

    def __init__(
        self,
        store: LocalStore,
        registry: Registry,
        uploads: Uploads,
        users: Users,
        copies: Copies,
        turns: Turns,
        keep_s: float,
        alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`keep_s`: how long contents are kept that no version ever had. `alone` holds the directory against other
        gateways on it, whose engines are not known here, or raises."""
        self._store = store
        self._registry = registry
        self._uploads = uploads
        self._users = users
        self._copies = copies
        self._turns = turns
        self._keep_s = keep_s
        self._alone = alone
        self._turn = asyncio.Lock()

    async def collect(self, *, dry_run: bool) -> Collected:
        """Free what can be freed, or only say what that is. Raises what `alone` raises."""
        async with self._turn:
            with contextlib.nullcontext() if dry_run else self._alone():
                return await self._collect(Collected(dry_run))

    async def _collect(self, report: Collected) -> Collected:
        named = await asyncio.to_thread(self._registry.digests)
        stored = set(await asyncio.to_thread(self._store.stored_versions))
        copies = await asyncio.to_thread(self._copies)
        freed: set[int] = set()
        for digest in sorted((stored | copies.keys()) - named):
            async with self._turns.of(digest):  # nobody publishes it
                if digest in await asyncio.to_thread(self._registry.digests):
                    continue
                if (why := await self._why_kept(digest, forget=not report.dry_run)) is not None:
                    report.kept[digest] = why
                    continue
                if digest in stored:
                    freed |= await asyncio.to_thread(self._store.inodes_of, digest)
                    report.versions.append(digest)
                await asyncio.to_thread(self._free, digest, copies.get(digest, []), report)
        await asyncio.to_thread(self._free_contents, freed, report)
        if not report.dry_run:
            log.info("collected %d version(s), %d bytes", len(report.versions), report.freed_bytes)
        return report

    async def _why_kept(self, digest: str, *, forget: bool) -> str | None:
        """Why a version that no name has must stay; None where it may go. The engine forgets it first."""
        if (use := self._users.use_of(digest)) is not None:
            return use
        names = await self._users.engine_names()
        if forget and names is not None and digest in names:
            await self._users.let_go(digest)
            names = await self._users.engine_names()
        if names is None:
            return "the base's engine does not say what it has loaded"
        if any(not name.startswith("sha256:") for name in names):
            return "the base's engine still answers requests with an adapter that it was told to forget"
        if forget and digest in names:
            return "the base's engine has it loaded"
        return self._users.use_of(digest)  # asked again: what came meanwhile is not known to the engine yet

    def _free(self, digest: str, copies: list[Path], report: Collected) -> None:
        for path in copies:
            report.freed_bytes += _size_bytes(path)
            report.copies += 1
            if not report.dry_run:
                shutil.rmtree(path, ignore_errors=True)
        if not report.dry_run:
            self._store.discard_version(digest)

    def _free_contents(self, freed: set[int], report: Collected) -> None:
        """Contents of the versions that went; and those that no version ever had, once they are old enough."""
        sizes: dict[str, int] = {}

        def unneeded() -> Iterator[str]:
            needed = self._registry.blobs()
            old_s = time.time() - self._keep_s
            for sha256, status in self._store.stored_blobs():
                was_published = status.st_ino in freed
                links = status.st_nlink - (1 if report.dry_run and was_published else 0)
                if sha256 not in needed and links == 1 and (was_published or status.st_mtime < old_s):
                    sizes[sha256] = status.st_size
                    yield sha256

        if report.dry_run:
            waiting = self._uploads.waiting()
            gone = [sha256 for sha256 in unneeded() if sha256 not in waiting]
        else:
            gone = self._uploads.collect(unneeded)
        report.contents = len(gone)
        report.freed_bytes += sum(sizes[sha256] for sha256 in gone)


def _size_bytes(directory: Path) -> int:
    """What a directory holds; files may go while they are counted."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
