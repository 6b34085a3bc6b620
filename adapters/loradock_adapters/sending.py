"""A checkpoint's files on their way to the server: hashed and sent side by side, a few at a time.

The server says how much of each file it has, so a connection that broke or a client that was killed costs no more than
what was in the air; nothing is remembered here. Knows nothing of names and versions.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import httpx

from loradock_adapters.connection import RETRIED, Connection, Patience, error_code, raise_for
from loradock_adapters.errors import CheckpointError, ServerError, UnreachableError
from loradock_adapters.manifest import CHUNK_BYTES, FileEntry, Manifest, hash_file, scan
from loradock_adapters.problems import Problem

HASHERS, SENDERS = 2, 4
_THERE = (httpx.codes.OK, httpx.codes.CREATED)
_NO_ROOM = (httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.INSUFFICIENT_STORAGE)
_WORTH_REPEATING = RETRIED | {0, httpx.codes.INTERNAL_SERVER_ERROR, httpx.codes.INSUFFICIENT_STORAGE}


class Progress(Protocol):
    """Told about each piece of work as it is done, one call at a time.

    `phase` is `hash` or `send`, which run side by side, and at last `publish`, of which nobody knows how long it takes;
    `fetch` where the server fetches. The total may be zero. Contents that the server has already count as sent.
    """

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None: ...


class _StoppedError(Exception):
    """Another file failed: this one is not gone on with."""


class Sending:
    """One push of the files of a directory. Used once."""

    def __init__(self, connection: Connection, directory: Path, tell: Progress) -> None:
        self._connection = connection
        self._directory = directory
        self._tell = tell
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._total_bytes = 0
        self._hashed_bytes = 0
        self._shown: dict[str, int] = {}
        """Path -> bytes of it that the progress shows as sent."""
        self._there: dict[str, int] = {}
        """Path -> bytes of it that the server said it has."""
        self._sends: dict[str, Future[None]] = {}
        """By sha256: a content that stands under two paths goes once."""
        self.sent_bytes = 0
        """What went over the wire, repetitions included."""

    def run(self) -> Manifest:
        """Hashes and sends everything. Raises CheckpointError, or ServerError that says what is there already."""
        sizes = {path: (self._directory / path).stat().st_size for path in scan(self._directory).kept}
        self._total_bytes = sum(sizes.values())
        for phase in ("hash", "send"):
            self._tell(phase, 0, self._total_bytes)
        with ThreadPoolExecutor(SENDERS, "loradock-send") as senders, ThreadPoolExecutor(HASHERS) as hashers:
            try:
                # The largest first: what goes last should not be what takes longest.
                largest_first = sorted(sizes, key=lambda path: -sizes[path])
                hashes = [hashers.submit(self._hash, path, senders) for path in largest_first]
                self._stop_after(hashes)
                wait(hashes)
                wait(self._sends.values())
            finally:
                self._stop.set()
        self._raise_first([*hashes, *self._sends.values()])
        return Manifest(tuple(done.result() for done in hashes))

    def send_again(self, manifest: Manifest, missing: Sequence[str]) -> None:
        """Sends contents that the server has lost since."""
        self._stop.clear()
        for entry in {entry.sha256: entry for entry in manifest.files if entry.sha256 in missing}.values():
            self._send(entry)

    def _stop_after(self, futures: Sequence[Future[Any]]) -> None:
        for future in futures:
            future.add_done_callback(lambda done: self._stop.set() if done.exception() is not None else None)

    def _raise_first(self, futures: Sequence[Future[Any]]) -> None:
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise self._last_words(error)

    def _last_words(self, error: BaseException) -> BaseException:
        """The error, with what is won already where the same command may succeed later."""
        if not isinstance(error, ServerError) or error.status not in _WORTH_REPEATING:
            return error
        there_bytes = sum(self._there.values())
        message = f"{error}; run the same command again: {there_bytes} of {self._total_bytes} bytes are there"
        if isinstance(error, UnreachableError):
            return UnreachableError(message)
        return ServerError(message, status=error.status, code=error.code, problems=error.problems)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _hash(self, path: str, senders: ThreadPoolExecutor) -> FileEntry:
        """Hashes one file and has it sent."""

        def hashed(piece_bytes: int) -> None:
            self._go_on()
            with self._lock:
                self._hashed_bytes += piece_bytes
                self._tell("hash", self._hashed_bytes, self._total_bytes)

        entry = hash_file(self._directory, path, hashed)
        with self._lock:
            send = None if entry.sha256 in self._sends else senders.submit(self._send, entry)
            if send is not None:
                self._sends[entry.sha256] = send
        if send is not None:
            self._stop_after([send])
        else:
            self._confirm(entry, entry.size_bytes)
        return entry

    def _show(self, path: str, done_bytes: int) -> None:
        with self._lock:
            self._shown[path] = done_bytes
            self._tell("send", sum(self._shown.values()), self._total_bytes)

    def _confirm(self, entry: FileEntry, there_bytes: int) -> None:
        self._there[entry.path] = there_bytes
        self._show(entry.path, there_bytes)

    def _send(self, entry: FileEntry) -> None:
        """Sends what the server lacks of one content, until it has all of it."""
        patience = Patience(self._connection.retry_waits_s, self._stop)
        while True:
            self._go_on()
            try:
                response = self._ask(entry)
                if response.status_code == httpx.codes.NOT_FOUND:
                    offset = _offset(response, entry)
                    patience.reached(offset)
                    self._confirm(entry, offset)
                    response = self._put(entry, offset)
            except httpx.TransportError as error:
                if not patience.wait():
                    self._go_on()
                    raise self._connection.unreachable(error) from error
                continue
            if response.status_code in _THERE:
                self._confirm(entry, entry.size_bytes)
                return
            if not _may_go_on(response, self._there.get(entry.path, 0)) or not patience.wait(response):
                self._go_on()
                raise_for(response)

    def _ask(self, entry: FileEntry) -> httpx.Response:
        """200 if the server has it, 404 with the offset if not, else what is in the way."""
        headers = {"upload-length": str(entry.size_bytes)}
        response = self._connection.once("HEAD", _url(entry), headers=headers)
        if response.status_code in _NO_ROOM:  # an answer to HEAD has no words
            question = {"content-range": f"bytes */{entry.size_bytes}"}
            response = self._connection.once("PUT", _url(entry), headers=question, content=b"")
        return response

    def _put(self, entry: FileEntry, offset: int) -> httpx.Response:
        headers = {"content-length": str(entry.size_bytes - offset), "content-type": "application/octet-stream"}
        if 0 < offset == entry.size_bytes:  # all of it was there when something broke: the server has to look once more
            headers["content-range"] = f"bytes */{entry.size_bytes}"
        elif offset > 0:
            headers["content-range"] = f"bytes {offset}-{entry.size_bytes - 1}/{entry.size_bytes}"
        return self._connection.once("PUT", _url(entry), headers=headers, content=self._chunks(entry, offset))

    def _chunks(self, entry: FileEntry, offset: int) -> Iterator[bytes]:
        done_bytes = offset
        with (self._directory / entry.path).open("rb") as file:
            file.seek(offset)
            while done_bytes < entry.size_bytes:
                self._go_on()
                chunk = file.read(min(CHUNK_BYTES, entry.size_bytes - done_bytes))
                if not chunk:
                    raise CheckpointError([Problem("file_changed", "it became shorter while it was sent", entry.path)])
                yield chunk
                done_bytes += len(chunk)
                with self._lock:
                    self.sent_bytes += len(chunk)
                self._show(entry.path, done_bytes)


def _url(entry: FileEntry) -> str:
    return f"/v1/adapters/blobs/{entry.sha256}"


def _offset(response: httpx.Response, entry: FileEntry) -> int:
    """Where to go on; a server that does not say has nothing."""
    text = response.headers.get("upload-offset", "")
    offset = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    return offset if offset <= entry.size_bytes else 0


def _may_go_on(response: httpx.Response, there_bytes: int) -> bool:
    """Whether the same again may be answered otherwise."""
    if response.status_code in (httpx.codes.ACCEPTED, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE, *RETRIED):
        return True
    # What was there before was not ours to vouch for; the server has forgotten it now.
    return there_bytes > 0 and error_code(response) == "digest_mismatch"
