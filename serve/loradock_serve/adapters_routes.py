"""`/v1/adapters`: uploading blobs, publishing manifests, listing, rolling back, removing.

The HTTP side only: what a version is and who may be one is decided in `publish.py` and `loradock_adapters`.
"""

import asyncio
import json
import re
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.names import check_name
from loradock_adapters.registry import Registry, Version
from loradock_adapters.store import LocalStore
from loradock_serve.catalog import Catalog, reasons_json
from loradock_serve.errors import BadRequestError, LengthRequiredError, TooLargeError
from loradock_serve.metrics import UPLOADED_BYTES
from loradock_serve.pins import Pins
from loradock_serve.publish import Publisher
from loradock_serve.residency import Look
from loradock_serve.states import States

SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 1024**2
WRITE_AT_ONCE_BYTES = 4 * 1024**2
"""Chunks are gathered up to this size before a thread writes and hashes them: a thread hop for 64 KiB costs more than
the work."""


def adapters_router(
    store: LocalStore,
    registry: Registry,
    catalog: Catalog,
    publisher: Publisher,
    states: States,
    pins: Pins,
    *,
    max_upload_bytes: int,
) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    @router.head("/blobs/{sha256}")
    async def has_blob(sha256: str) -> Response:
        return Response(status_code=200 if store.has_blob(_sha256(sha256)) else 404)

    @router.put("/blobs/{sha256}")
    async def put_blob(sha256: str, request: Request) -> Response:
        size = _announced_size(request, max_upload_bytes)
        if store.has_blob(_sha256(sha256)):
            return JSONResponse({"sha256": sha256, "stored": False})
        await _receive(store, sha256, size, request)
        UPLOADED_BYTES.inc(size)
        return JSONResponse({"sha256": sha256, "stored": True}, 201)

    @router.post("/{name}/versions")
    async def publish(name: str, request: Request) -> Response:
        published = await publisher.publish(name, await _json_object(request))
        return JSONResponse(published.to_json(), 201 if published.version.created else 200)

    @router.get("")
    async def all_adapters() -> Response:
        look = await states.look()
        data = [_row(version, states, pins, look) for version in map(catalog.fit, registry.models())]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/{name}")
    async def one_adapter(name: str) -> Response:
        versions = [catalog.fit(version) for version in registry.versions(check_name(name))]
        current = next(version for version in versions if version.current)
        return JSONResponse(await _whole(current, versions, states, pins))

    @router.delete("/{name}")
    async def remove(name: str) -> Response:
        await publisher.remove(check_name(name))
        return JSONResponse({"name": name, "deleted": True})

    @router.post("/{name}/rollback")
    async def roll_back(name: str, request: Request) -> Response:
        number = (await _json_object(request)).get("version")
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadRequestError('Say which version: {"version": 2}', param="version")
        version = catalog.fit(await publisher.roll_back(check_name(name), number))
        return JSONResponse(summary(version, states.of(version)))

    return router


def _row(version: Version, states: States, pins: Pins, look: Look) -> dict[str, Any]:
    pinned = pins.state_of(version.name)[0] is not None
    where = {"residency": states.place(version, look), "pinned": pinned}
    return summary(version, states.of(version)) | where


async def _whole(current: Version, versions: list[Version], states: States, pins: Pins) -> dict[str, Any]:
    residency = states.residency(current, await states.look())
    pinned = pins.state_of(current.name)[0] is not None
    return details(current, versions, states.of(current)) | {"pinned": pinned, "residency": residency}


def summary(version: Version, state: str) -> dict[str, Any]:
    """A name in a list: its current version."""
    return {
        "name": version.name,
        "current_version": version.number,
        "digest": version.digest,
        "kind": version.kind,
        "placement": version.placement,
        "size_bytes": version.size_bytes,
        "created_at": version.created_at.isoformat(),
        "state": state,
    }


def details(current: Version, versions: list[Version], state: str) -> dict[str, Any]:
    """A name with everything known of it."""
    history = [
        {
            "version": version.number,
            "digest": version.digest,
            "kind": version.kind,
            "placement": version.placement,
            "size_bytes": version.size_bytes,
            "created_at": version.created_at.isoformat(),
            "current": version.current,
        }
        for version in versions
    ]
    return summary(current, state) | {
        "rank": current.rank,
        "reasons": reasons_json(current.reasons),
        "stop_token_ids": list(current.stop_token_ids),
        "own_chat_template": current.chat_template is not None,
        "versions": history,
    }


def _sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise BadRequestError("A blob is named by the 64 lower-case hex digits of its sha256", param="sha256")
    return text


def _announced_size(request: Request, limit_bytes: int) -> int:
    """The body's size from its header, checked before a byte is read."""
    text = request.headers.get("content-length", "")
    if not text.isdigit():
        raise LengthRequiredError("An upload needs a Content-Length header")
    if int(text) > limit_bytes:
        raise TooLargeError(f"A file of {text} bytes is over this server's limit of {limit_bytes} (`max_upload_bytes`)")
    return int(text)


async def _receive(store: LocalStore, sha256: str, size: int, request: Request) -> None:
    """Stream the body into the store; nothing is visible unless size and hash agree at the end."""
    writer = await asyncio.to_thread(store.writer, sha256, size)
    try:
        gathered = bytearray()
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= WRITE_AT_ONCE_BYTES:
                await asyncio.to_thread(writer.write, bytes(gathered))
                gathered.clear()
        await asyncio.to_thread(writer.write, bytes(gathered))
        await asyncio.to_thread(writer.commit)
    finally:
        await asyncio.to_thread(writer.abort)  # harmless after a commit


async def _json_object(request: Request) -> dict[str, Any]:
    gathered = bytearray()
    async for chunk in request.stream():
        gathered += chunk
        if len(gathered) > MAX_MANIFEST_BYTES:
            raise TooLargeError(f"The body is over the limit of {MAX_MANIFEST_BYTES} bytes")
    try:
        data = json.loads(bytes(gathered))
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequestError("The body must be a JSON object", code="invalid_json")
    return data
