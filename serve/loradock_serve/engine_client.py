"""The gateway's side of an engine's HTTP: health, status, adapters, and the connection that requests go over.

One client per start of an engine. Knows the engine's private routes (`inside/endpoints.py`); knows nothing of models'
public names.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from loradock_serve.engine_http import EngineGoneError, Exchange, Pool
from loradock_serve.errors import EngineError, EngineRefusedError, EngineUnavailableError

PROBE_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 300.0
STATUS_TIMEOUT_S = 60.0
CLOSE_GRACE_S = 5.0
# Our engines keep an idle connection for an hour; a vLLM that something else runs closes it after 5 s, and a request
# must not meet a closing one.
OWN_KEEP_ALIVE_S, FOREIGN_KEEP_ALIVE_S = 600.0, 3.0
JSON_BODY = {"content-type": "application/json"}


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
        self._pool = Pool(url, keep_alive_s=OWN_KEEP_ALIVE_S if url.startswith("unix://") else FOREIGN_KEEP_ALIVE_S)

    async def close(self) -> None:
        """Close every connection, once the requests in flight have seen the end of the engine."""
        await self._pool.close(CLOSE_GRACE_S)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Exchange:
        """A request: `async with client.post(…) as answer`, inside of which the engine's headers are here.

        EngineGoneError where the engine is not there, or goes away. An answer that is not read to its end by the end of
        the block is broken off: the engine aborts the request.
        """
        return self._pool.exchange("POST", path, body, headers)

    async def is_healthy(self) -> bool | None:
        """True or False as the engine says; None where it does not answer in time (it may just be busy)."""
        try:
            status, _ = await self._get("/health", PROBE_TIMEOUT_S)
        except EngineGoneError:
            return False
        except TimeoutError:
            return None
        return status == 200

    async def status(self) -> EngineStatus | None:
        """What the engine says of itself; None where it does not have our plug-in."""
        try:
            status, text = await self._get("/loradock/status", STATUS_TIMEOUT_S)
            if status == 404:
                return None
            data = json.loads(text)
            if status != 200:
                raise EngineError(f"the engine's status route answered {status}: {data}")
            return EngineStatus.from_json(data)
        except (EngineGoneError, TimeoutError, ValueError, KeyError) as error:
            raise EngineError(f"the engine's status cannot be read: {error!r}") from error

    async def _get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        async with asyncio.timeout(timeout_s):
            exchange = self._pool.exchange("GET", path, b"", {})
            try:
                async with exchange as answer:
                    return answer.status, await answer.read()
            except EngineGoneError:
                if not exchange.reused:
                    raise
            # The engine may have closed an idle connection just then; asking twice harms nobody.
            async with self._pool.exchange("GET", path, b"", {}, fresh=True) as answer:
                return answer.status, await answer.read()

    async def load_adapter(self, name: str, path: str, packed: str | None = None) -> None:
        """Have the engine load an adapter; EngineRefusedError with the engine's own words where it will not.

        `packed` is a directory with the same adapter in the form that is read fastest.
        """
        await self._adapter_call("load", {"name": name, "path": path} | ({"packed": packed} if packed else {}))

    async def unload_adapter(self, name: str) -> None:
        """Have the engine forget an adapter and free its weights."""
        await self._adapter_call("unload", {"name": name})

    async def pin_adapter(self, name: str) -> None:
        """Have the engine put a loaded adapter into a slot, and keep it there."""
        await self._adapter_call("pin", {"name": name})

    async def unpin_adapter(self, name: str) -> None:
        """Have the engine let a pinned adapter leave its slot when another needs it."""
        await self._adapter_call("unpin", {"name": name})

    async def probe(self, name: str | None, prompts: Sequence[Sequence[int]]) -> list[list[tuple[int, float | None]]]:
        """The likeliest next tokens of each prompt with their log-probabilities, by an adapter or (None) by the base.

        EngineRefusedError where the engine cannot say: no such route, another sort of model, a prompt that is too long.
        """
        document = {"prompts": [list(prompt) for prompt in prompts]} | ({"name": name} if name is not None else {})
        text = await self._asked("/loradock/probe", document, "answer probe prompts")
        try:
            return [[(int(token), value) for token, value in answer] for answer in json.loads(text)["answers"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"the engine's answer to probe prompts cannot be read: {error!r}") from error

    async def _adapter_call(self, verb: str, body: Mapping[str, str]) -> None:
        await self._asked(f"/loradock/adapters/{verb}", body, f"{verb} an adapter")

    async def _asked(self, path: str, body: Mapping[str, Any], what: str) -> str:
        sent = json.dumps(dict(body)).encode()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S), self.post(path, sent, JSON_BODY) as answer:
                text = (await answer.read()).decode(errors="replace")
                status = answer.status
        except (EngineGoneError, TimeoutError) as error:
            raise EngineUnavailableError(f"the engine went away while it was to {what}: {error!r}") from error
        if status >= 500:
            raise EngineUnavailableError(f"the engine failed to {what}: {_message(text)}")
        if status >= 400:
            raise EngineRefusedError(f"The engine refuses to {what}: {_message(text)}")
        return text


def _message(text: str) -> str:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return text
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
