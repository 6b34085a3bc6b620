"""The HTTP API of a Loradock server as the churn test's clients use it: asking, publishing, pinning, hanging up.

On aiohttp: thousands of requests from the process that also judges them. Knows nothing of what is asked, nor why.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from loradock_adapters.manifest import Manifest, hash_file, scan

TIMEOUT_S = 240.0


class ApiError(Exception):
    """An answer that is none."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status} {body[:300]}")
        self.status = status
        self.body = body

    @property
    def is_unknown_model(self) -> bool:
        """Whether the server knows no such name."""
        return self.status == 404 and '"model_not_found"' in self.body


@dataclass(frozen=True)
class Reply:
    """One answer."""

    model: str
    version: int | None
    """Of `x-loradock-version`; the base has none."""
    tokens: tuple[int, ...]


class Api:
    """One server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, path: str, body: dict[str, Any], hang_up_s: float | None = None) -> Reply | None:
        """One request. With `hang_up_s` the client goes after the first part of a stream, or after so long; None then.

        Raises:
            ApiError: The server refused, or a stream ended without its end.
        """
        async with self._session.post(path, json=body) as response:
            if response.status != 200:
                raise ApiError(response.status, await response.text())
            version = response.headers.get("x-loradock-version")
            number = int(version) if version is not None else None
            if not body.get("stream"):
                parts = [await response.json()]
            elif hang_up_s is None:
                parts = [part async for part in _events(response)]
            else:
                async for _ in _events(response):
                    response.close()
                    return None
        tokens = tuple(token for part in parts for choice in part["choices"] for token in choice.get("token_ids") or ())
        (model,) = {part["model"] for part in parts}
        return Reply(model, number, tokens)

    async def ask_and_go(self, path: str, body: dict[str, Any], after_s: float) -> bool:
        """A request whose client hangs up; False if the answer was faster."""
        try:
            async with asyncio.timeout(after_s if not body.get("stream") else TIMEOUT_S):
                return await self.ask(path, body, hang_up_s=after_s) is None
        except TimeoutError:
            return True

    async def push(self, name: str, directory: Path) -> dict[str, Any]:
        """Publish a checkpoint as the next version of a name; the server's answer."""
        manifest = Manifest(tuple(hash_file(directory, path) for path in scan(directory).kept))
        for entry in manifest.files:
            data = (directory / entry.path).read_bytes()
            await self._json("PUT", f"/v1/adapters/blobs/{entry.sha256}", data=data)
        return await self._json("POST", f"/v1/adapters/{name}/versions", json=manifest.to_json())

    async def promote(self, name: str, number: int) -> dict[str, Any]:
        """Point the name at one of its versions."""
        return await self._json("POST", f"/v1/adapters/{name}/promote", json={"version": number})

    async def roll_back(self, name: str, number: int) -> dict[str, Any]:
        """Point a name at one of its versions."""
        return await self._json("POST", f"/v1/adapters/{name}/rollback", json={"version": number})

    async def remove(self, name: str) -> None:
        """Remove a name with its versions."""
        await self._json("DELETE", f"/v1/adapters/{name}")

    async def pin(self, name: str) -> dict[str, Any]:
        """Keep a name's adapter in a slot."""
        return await self._json("POST", f"/v1/adapters/{name}/pin")

    async def unpin(self, name: str) -> dict[str, Any]:
        """Let it go again."""
        return await self._json("DELETE", f"/v1/adapters/{name}/pin")

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._session.request(method, path, **options) as response:
            if not response.ok:
                raise ApiError(response.status, await response.text())
            answer: dict[str, Any] = await response.json()
            return answer


def api_session(url: str) -> aiohttp.ClientSession:
    """Connections to a server; close it in the loop that used it."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    # Less than servers keep idle connections: a request on one that is just being closed would fail.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to `[DONE]`; ApiError where it ends otherwise."""
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise ApiError(200, f"an error in a stream: {event['error']}")
        if event["choices"]:
            yield event
    raise ApiError(200, "a stream without its end")
