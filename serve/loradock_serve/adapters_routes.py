"""`/v1/adapters`: publishing manifests, listing, rolling back, removing. Uploads are in `blobs_routes.py`.

The HTTP side only: what a version is and who may be one is decided in `publish.py` and `loradock_adapters`.
"""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.names import check_name
from loradock_adapters.registry import Registry, Version
from loradock_serve.auth import publisher_of
from loradock_serve.catalog import Catalog, reasons_json
from loradock_serve.errors import BadRequestError, TooLargeError
from loradock_serve.pins import Pins
from loradock_serve.proof import proof_state
from loradock_serve.publish import Publisher
from loradock_serve.residency import Look
from loradock_serve.states import States

MAX_MANIFEST_BYTES = 1024**2


def adapters_router(
    registry: Registry,
    catalog: Catalog,
    publisher: Publisher,
    states: States,
    pins: Pins,
) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    @router.post("/{name}/versions")
    async def publish(name: str, request: Request) -> Response:
        published = await publisher.publish(name, await _json_object(request), publisher_of(request.scope))
        location = {"location": f"/v1/models/{published.version.ref}"}
        return JSONResponse(published.to_json(), 201 if published.version.created else 200, headers=location)

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
        "state": "failed" if proof_state(version.proof) == "failed" else state,
        "proven": proof_state(version.proof),
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
            "proven": proof_state(version.proof),
        }
        for version in versions
    ]
    return summary(current, state) | {
        "rank": current.rank,
        "reasons": reasons_json(current.reasons),
        "repairs": reasons_json(current.repairs),
        "stop_token_ids": list(current.stop_token_ids),
        "own_chat_template": current.chat_template is not None,
        "proof": current.proof or {"state": proof_state(None)},
        "versions": history,
    }


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
