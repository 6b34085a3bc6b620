"""One server, and how patient to be with it: requests that are sent again, and answers turned into errors.

Every request that goes through here may safely arrive twice. Knows nothing of what is asked.
"""

import random
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import httpx

from loradock_adapters.errors import ServerError, UnreachableError
from loradock_adapters.problems import Problem

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0
"""The server may scan gigabytes of values before it answers a publication."""
WRITE_TIMEOUT_S = 300.0
"""It hashes what it holds of a file before it takes the rest: about a second a gigabyte."""
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
MAX_RETRY_AFTER_S = 60.0
RETRIED = frozenset({408, 423, 429, 502, 503, 504})
"""Statuses that pass."""
MISSING_BLOBS = "missing_blobs"


class MissingBlobsAnswerError(ServerError):
    """The server lacks contents that a manifest names."""

    def __init__(self, message: str, *, status: int, missing: list[str]) -> None:
        super().__init__(message, status=status, code=MISSING_BLOBS)
        self.missing = missing


class Patience:
    """The pauses before one thing is tried again. Whatever gets on begins them anew."""

    def __init__(self, waits_s: Sequence[float], stop: threading.Event | None = None) -> None:
        self._waits_s = tuple(waits_s)
        self._tried = 0
        self._furthest = -1
        self._stop = stop or threading.Event()

    def reached(self, position: int) -> None:
        """How far it has come."""
        if position > self._furthest:
            self._furthest, self._tried = position, 0

    def wait(self, response: httpx.Response | None = None) -> bool:
        """Waits, as long as the answer says or a little longer each time; False where it is time to give up."""
        if self._tried >= len(self._waits_s) or self._stop.is_set():
            return False
        pause_s = self._waits_s[self._tried] * random.uniform(0.7, 1.0)  # not all clients at the same moment
        if response is not None and self._waits_s[self._tried]:
            pause_s = max(pause_s, _retry_after_s(response))
        self._tried += 1
        return not self._stop.wait(pause_s)


class Connection:
    """Speaks to one server. Threads may share it."""

    def __init__(
        self, server: str, api_key: str | None, transport: httpx.BaseTransport | None, retry_waits_s: Sequence[float]
    ) -> None:
        self.server = server.rstrip("/").removesuffix("/v1")
        self.retry_waits_s = tuple(retry_waits_s)
        self._answered = False  # a server that never answered is not worth waiting for
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.server, headers=headers, timeout=timeout, transport=transport)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise UnreachableError(f"{server} or the key for it is not usable: {error}") from error

    def close(self) -> None:
        self._http.close()

    def once(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        headers: dict[str, str] | None = None,
        content: Iterable[bytes] | bytes | None = None,
    ) -> httpx.Response:
        """One request. Raises httpx.TransportError where the connection broke, and it is worth another try."""
        try:
            response = self._http.request(method, path, json=json, headers=headers, content=content)
        except httpx.UnsupportedProtocol as error:
            raise UnreachableError(
                f"{self.server} is no server's address: start it with http:// or https://"
            ) from error
        except httpx.ConnectError as error:
            if not self._answered:
                raise self.unreachable(error) from error
            raise
        self._answered = True
        return response

    def request(
        self, method: str, path: str, *, json: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """A request, sent again while its connection breaks or the server says that this will pass."""
        patience = Patience(self.retry_waits_s)
        while True:
            try:
                response = self.once(method, path, json=json, headers=headers)
            except httpx.TransportError as error:
                if not patience.wait():
                    raise self.unreachable(error) from error
                continue
            if response.status_code not in RETRIED or not patience.wait(response):
                return response

    def json(
        self, method: str, path: str, json: object = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The object that a request is answered with. Raises ServerError."""
        response = self.request(method, path, json=json, headers=headers)
        raise_for(response)
        document = _document(response)
        if document is None:
            message = f"{self.server} did not answer with JSON: is it a Loradock server?"
            raise ServerError(message, status=response.status_code)
        return document

    def unreachable(self, error: httpx.TransportError) -> UnreachableError:
        """What to say when nothing came back."""
        reason = str(error) or type(error).__name__
        return UnreachableError(f"no answer from {self.server} ({reason}); is `loradock serve` running there?")


def raise_for(response: httpx.Response) -> None:
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
    if code == MISSING_BLOBS and isinstance(missing, list):
        names = [sha256 for sha256 in missing if isinstance(sha256, str)]
        raise MissingBlobsAnswerError(message, status=response.status_code, missing=names)
    problems = error.get("problems")
    found = [Problem.from_json(problem) for problem in problems] if isinstance(problems, list) else []
    raise ServerError(message, status=response.status_code, code=code, problems=found)


def error_code(response: httpx.Response) -> object:
    """The `code` of an error answer."""
    error = (_document(response) or {}).get("error")
    return error.get("code") if isinstance(error, dict) else None


def _document(response: httpx.Response) -> dict[str, Any] | None:
    try:
        document = response.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 0.0
