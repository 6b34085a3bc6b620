"""A request's body on its way into an upload, in pieces that are worth a thread's while.

Whatever ends it, what came is written first. A client that sends next to nothing is not waited for. Does not know what
the bytes are.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from types import TracebackType
from typing import Self

from loradock_adapters.uploads import Upload
from loradock_serve.errors import TooManyUploadsError, UploadStalledError

WRITE_AT_ONCE_BYTES = 2 * 1024**2
"""Chunks are gathered up to this size before a thread writes and hashes them: a thread hop for 64 KiB costs more than
the work."""
PROGRESS_BYTES = 64 * 1024
"""What has to come in every `stall_s`."""


class Parallel:
    """How many uploads each publisher has under way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[str, int] = {}

    @contextlib.contextmanager
    def turn(self, publisher: str) -> Iterator[None]:
        """Raises TooManyUploadsError."""
        running = self._running.get(publisher, 0)
        if running >= self._limit:
            raise TooManyUploadsError(
                f"{running} files are being uploaded already, and {self._limit} may be at the same moment "
                "(`uploads.max_parallel`): send this one when another is done"
            )
        self._running[publisher] = running + 1
        try:
            yield
        finally:
            self._running[publisher] -= 1
            if not self._running[publisher]:
                del self._running[publisher]


async def receive(upload: Upload, body: AsyncIterator[bytes], writers: Executor, stall_s: float) -> None:
    """Writes what comes. Raises UploadStalledError, what `body` raises where its client is gone, and what the disk
    does."""
    loop = asyncio.get_running_loop()
    try:
        async with _Behind(upload, writers) as behind, asyncio.timeout(stall_s) as patience:
            lately_bytes = 0
            async for chunk in body:
                lately_bytes += len(chunk)
                if behind.add(chunk):
                    patience.reschedule(None)  # the disk's time is not the client's
                    await behind.write()
                    lately_bytes = PROGRESS_BYTES
                if lately_bytes >= PROGRESS_BYTES:
                    lately_bytes = 0
                    patience.reschedule(loop.time() + stall_s)
            patience.reschedule(None)
    except TimeoutError:
        raise UploadStalledError(
            f"Less than {PROGRESS_BYTES} bytes came in {stall_s:g} s: the {upload.held_bytes} bytes that are here are "
            "kept, go on there"
        ) from None


class _Behind:
    """Writes one lot in a thread while the next one is gathered; everything is written when the block ends."""

    def __init__(self, upload: Upload, writers: Executor) -> None:
        self._upload = upload
        self._writers = writers
        self._chunks: list[bytes] = []
        self._gathered_bytes = 0
        self._writing: asyncio.Future[None] | None = None

    def add(self, chunk: bytes) -> bool:
        """Whether it is time to write."""
        self._chunks.append(chunk)
        self._gathered_bytes += len(chunk)
        return self._gathered_bytes >= WRITE_AT_ONCE_BYTES

    async def write(self) -> None:
        """Returns when the lot before is written and this one has begun."""
        await self._done()
        chunks, self._chunks, self._gathered_bytes = self._chunks, [], 0
        self._writing = asyncio.get_running_loop().run_in_executor(self._writers, self._upload.write, chunks)

    async def _done(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await asyncio.shield(writing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        disk_failed = isinstance(error, OSError) and not isinstance(error, TimeoutError)
        if not disk_failed:
            await self.write()
            await self._done()
