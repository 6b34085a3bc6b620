"""The gateway's side of an engine's HTTP: health, status, adapters, and the connection that requests go over.

One client per start of an engine. Knows the engine's private routes (`inside/endpoints.py`); knows nothing of models'
public names.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from loradock_serve.errors import EngineError, EngineRefusedError, EngineUnavailableError

PROBE_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 300.0
# A stream may be silent for as long as a request waits inside the engine; the gateway's own deadline ends it.
STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
CLOSE_GRACE_S = 5.0
READ_CHUNK_BYTES = 256 * 1024
# Answers go on to clients as they are, so they must not come compressed.
PLAIN_ANSWERS = {"accept-encoding": "identity"}


@dataclass(frozen=True)
class EngineStatus:
    """What the engine says of itself on `/loradock/status`."""

    device: str
    lora_wrapper: str | None
    corrected: bool
    registered: tuple[str, ...]
    limits: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From the route's JSON; KeyError where a field is missing."""
        return cls(
            device=data["device"],
            lora_wrapper=data["lora_wrapper"],
            corrected=bool(data["corrected"]),
            registered=tuple(data["registered"]),
            limits=data,
        )


class EngineClient:
    """HTTP to one engine, over a Unix socket (`unix:///path`) or TCP (`http://host:port`)."""

    def __init__(self, url: str) -> None:
        connector: aiohttp.BaseConnector
        if url.startswith("unix://"):
            connector = aiohttp.UnixConnector(path=url.removeprefix("unix://"), limit=0, keepalive_timeout=600)
            self._origin = "http://engine"
        else:
            # Below the 5 s after which vLLM closes an idle connection: a request must not meet a closing one.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
            self._origin = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=STREAM_TIMEOUT,
            auto_decompress=False,
            read_bufsize=READ_CHUNK_BYTES,
            headers=PLAIN_ANSWERS,
            skip_auto_headers=("user-agent",),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def close(self) -> None:
        """Close every connection, once the requests in flight have seen the end of the engine.

        aiohttp drops the body of an answer that is being read when its session closes: the reader would wait for ever.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), CLOSE_GRACE_S)
        await self._session.close()

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; the block begins when the engine's headers are here. aiohttp's errors pass through.

        An answer that is not read to its end by the end of the block is broken off: the engine aborts the request.
        """
        if self._session.closed:  # between its lease and now the engine broke
            raise aiohttp.ClientConnectionError("the engine has gone")
        self._in_flight += 1
        self._idle.clear()
        try:
            url = self._origin + path
            answer = await self._session.post(url, data=body, headers=headers, allow_redirects=False)
            try:
                yield answer
            finally:
                answer.close()
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def is_healthy(self) -> bool | None:
        """True or False as the engine says; None where it does not answer in time (it may just be busy)."""
        if self._session.closed:
            return False
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
            async with self._session.get(f"{self._origin}/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError):
            return False
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def status(self) -> EngineStatus | None:
        """What the engine says of itself; None where it does not have our plug-in."""
        try:
            timeout = aiohttp.ClientTimeout(total=60)
            async with self._session.get(f"{self._origin}/loradock/status", timeout=timeout) as answer:
                if answer.status == 404:
                    return None
                data = await answer.json(content_type=None)
                if answer.status != 200:
                    raise EngineError(f"the engine's status route answered {answer.status}: {data}")
                return EngineStatus.from_json(data)
        except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError, KeyError) as error:
            raise EngineError(f"the engine's status cannot be read: {error!r}") from error

    async def load_adapter(self, name: str, path: str) -> None:
        """Have the engine load an adapter; EngineRefusedError with the engine's own words where it will not."""
        await self._adapter_call("load", {"name": name, "path": path})

    async def unload_adapter(self, name: str) -> None:
        """Have the engine forget an adapter and free its weights."""
        await self._adapter_call("unload", {"name": name})

    async def _adapter_call(self, verb: str, body: Mapping[str, str]) -> None:
        if self._session.closed:
            raise EngineUnavailableError(f"the engine has gone before it was to {verb} an adapter")
        try:
            timeout = aiohttp.ClientTimeout(total=LOAD_TIMEOUT_S)
            url = f"{self._origin}/loradock/adapters/{verb}"
            async with self._session.post(url, json=dict(body), timeout=timeout) as answer:
                text = await answer.text()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailableError(
                f"the engine went away while it was to {verb} an adapter: {error!r}"
            ) from error
        if status >= 500:
            raise EngineUnavailableError(f"the engine failed to {verb} an adapter: {_message(text)}")
        if status >= 400:
            raise EngineRefusedError(f"The engine refuses to {verb} the adapter: {_message(text)}")


def _message(text: str) -> str:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return text
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
