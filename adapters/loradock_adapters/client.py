"""The client of a Loradock server: publish, list, show, roll back, pin, remove.

Publishing hashes the files, asks which contents the server lacks, sends only those, and then the list of files. Every
request may be repeated: contents are known by their hash, and the same bytes again make no new version. Needs httpx and
nothing heavier.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.errors import CheckpointError, ServerError, UnreachableError
from loradock_adapters.manifest import CHUNK_BYTES, FileEntry, Manifest, hash_file, scan
from loradock_adapters.names import check_name
from loradock_adapters.problems import Problem

DEFAULT_SERVER = "http://127.0.0.1:8080"
_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 600.0  # the server may scan gigabytes of values before it answers a publication
_MISSING_BLOBS = "missing_blobs"


class Progress(Protocol):
    """Told about each piece of work as it is done. `phase` is `hash`, then `send`; the total may be zero."""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None: ...


def _silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    pass


class Client:
    """Speaks to one server. Close it, or use it as a context manager."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        retry_waits_s: Sequence[float] = (0.5, 2.0),
    ) -> None:
        """`retry_waits_s`: the pauses before a request whose connection broke is sent again."""
        self.server = server.rstrip("/").removesuffix("/v1")
        self._retry_waits_s = tuple(retry_waits_s)
        self._answered = False  # a server that never answered is not worth waiting for
        try:
            self._http = httpx.Client(
                base_url=self.server,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
                transport=transport,
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise UnreachableError(f"{server} or the key for it is not usable: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def push(self, path: Path, name: str, progress: Progress | None = None) -> dict[str, Any]:
        """Publishes a checkpoint directory, or a trainer's run directory, as the next version of a name.

        Returns the server's answer, with `sent_bytes`, `size_bytes` and `seconds` added. Raises CheckpointError before
        anything is sent if the directory is broken, ServerError with the gate's problems if the server refuses it.
        """
        started_s = time.monotonic()
        check_name(name)
        checkpoint = read_checkpoint(path)
        if checkpoint.problems:
            raise CheckpointError(checkpoint.problems)
        tell = progress or _silent
        manifest = _hash(checkpoint.directory, tell)
        sent_bytes = self._send(manifest, checkpoint.directory, self._missing(manifest), tell)
        try:
            answer = self._publish(name, manifest)
        except _MissingBlobsAnswerError as error:  # collected by the server between our question and our publication
            sent_bytes += self._send(manifest, checkpoint.directory, error.missing, tell)
            answer = self._publish(name, manifest)
        seconds = time.monotonic() - started_s
        return {**answer, "sent_bytes": sent_bytes, "size_bytes": manifest.size_bytes, "seconds": round(seconds, 3)}

    def models(self) -> list[dict[str, Any]]:
        """The published models, each with its current version."""
        rows = self._json("GET", "/v1/adapters").get("data")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def show(self, name: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/adapters/{check_name(name)}")

    def rm(self, name: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/adapters/{check_name(name)}")

    def rollback(self, name: str, version: int) -> dict[str, Any]:
        return self._json("POST", f"/v1/adapters/{check_name(name)}/rollback", json={"version": version})

    def pin(self, name: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/adapters/{check_name(name)}/pin")

    def unpin(self, name: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/adapters/{check_name(name)}/pin")

    def plan(self) -> dict[str, Any]:
        """What the server would choose for itself at its next start, and what runs now."""
        return self._json("GET", "/v1/plan")

    def _missing(self, manifest: Manifest) -> list[str]:
        """The contents that the server lacks."""
        missing = []
        for sha256 in manifest.blobs:
            response = self._request("HEAD", f"/v1/adapters/blobs/{sha256}")
            if response.status_code == httpx.codes.NOT_FOUND:
                missing.append(sha256)
            else:
                _raise_for(response)
        return missing

    def _send(self, manifest: Manifest, directory: Path, wanted: Sequence[str], tell: Progress) -> int:
        """Sends contents; returns their bytes."""
        entries = {entry.sha256: entry for entry in manifest.files if entry.sha256 in wanted}
        total_bytes = sum(entry.size_bytes for entry in entries.values())
        done_bytes = 0
        tell("send", 0, total_bytes)
        for entry in entries.values():

            def sent(piece_bytes: int, before_bytes: int = done_bytes) -> None:
                tell("send", before_bytes + piece_bytes, total_bytes)

            self._put(directory / entry.path, entry, sent)
            done_bytes += entry.size_bytes
        return total_bytes

    def _put(self, path: Path, entry: FileEntry, sent: Callable[[int], None]) -> None:
        headers = {"Content-Length": str(entry.size_bytes), "Content-Type": "application/octet-stream"}
        response = self._request(
            "PUT", f"/v1/adapters/blobs/{entry.sha256}", headers=headers, body=lambda: _chunks(path, sent)
        )
        _raise_for(response)

    def _publish(self, name: str, manifest: Manifest) -> dict[str, Any]:
        return self._json("POST", f"/v1/adapters/{name}/versions", json=manifest.to_json())

    def _json(self, method: str, path: str, json: object = None) -> dict[str, Any]:
        response = self._request(method, path, json=json)
        _raise_for(response)
        document = _document(response)
        if document is None:
            message = f"{self.server} did not answer with JSON: is it a Loradock server?"
            raise ServerError(message, status=response.status_code)
        return document

    def _request(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        headers: dict[str, str] | None = None,
        body: Callable[[], Iterator[bytes]] | None = None,
    ) -> httpx.Response:
        """One request, sent again when its connection breaks: every request here may safely arrive twice."""
        for wait_s in [*self._retry_waits_s, None]:
            try:
                content = body() if body is not None else None
                response = self._http.request(method, path, json=json, headers=headers, content=content)
                self._answered = True
                return response
            except httpx.UnsupportedProtocol as error:
                raise UnreachableError(
                    f"{self.server} is no server's address: start it with http:// or https://"
                ) from error
            except httpx.TransportError as error:
                if wait_s is None or (isinstance(error, httpx.ConnectError) and not self._answered):
                    reason = str(error) or type(error).__name__
                    message = f"no answer from {self.server} ({reason}); is `loradock serve` running there?"
                    raise UnreachableError(message) from error
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


class _MissingBlobsAnswerError(ServerError):
    """The server lacks contents that a manifest names."""

    def __init__(self, message: str, *, status: int, missing: list[str]) -> None:
        super().__init__(message, status=status, code=_MISSING_BLOBS)
        self.missing = missing


def _hash(directory: Path, tell: Progress) -> Manifest:
    paths = scan(directory).kept
    total_bytes = sum((directory / path).stat().st_size for path in paths)
    done_bytes = 0

    def hashed(piece_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += piece_bytes
        tell("hash", done_bytes, total_bytes)

    tell("hash", 0, total_bytes)
    return Manifest(tuple(hash_file(directory, path, hashed) for path in paths))


def _chunks(path: Path, sent: Callable[[int], None]) -> Iterator[bytes]:
    done_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            done_bytes += len(chunk)
            sent(done_bytes)


def _document(response: httpx.Response) -> dict[str, Any] | None:
    try:
        document = response.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _raise_for(response: httpx.Response) -> None:
    """Turns an error answer into the ServerError that it describes."""
    if response.is_success:
        return
    body = (_document(response) or {}).get("error")
    error: dict[str, Any] = body if isinstance(body, dict) else {}
    message = error.get("message")
    if not isinstance(message, str):
        message = f"the server answered {response.status_code} {response.reason_phrase}".strip()
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += " (set LORADOCK_API_KEY or --api-key)"
    code = error.get("code") if isinstance(error.get("code"), str) else None
    missing = error.get("missing")
    if code == _MISSING_BLOBS and isinstance(missing, list):
        names = [sha256 for sha256 in missing if isinstance(sha256, str)]
        raise _MissingBlobsAnswerError(message, status=response.status_code, missing=names)
    problems = error.get("problems")
    found = [Problem.from_json(problem) for problem in problems] if isinstance(problems, list) else []
    raise ServerError(message, status=response.status_code, code=code, problems=found)
