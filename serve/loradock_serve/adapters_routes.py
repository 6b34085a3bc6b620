"""`/v1/adapters`: publishing manifests, listing, showing. Uploads are in `blobs_routes.py`, moving names and removing
them in `pointers_routes.py`.

The HTTP side only: what a version is and who may be one is decided in `publish.py` and `loradock_adapters`.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.names import check_name
from loradock_adapters.registry import Registry, Version
from loradock_serve.auth import publisher_of
from loradock_serve.catalog import Catalog, reasons_json, split_json
from loradock_serve.json_body import json_object
from loradock_serve.pins import Pins
from loradock_serve.proof import proof_state
from loradock_serve.publish import Publisher
from loradock_serve.residency import Look
from loradock_serve.source_push import SourcePush
from loradock_serve.states import States


def adapters_router(
    registry: Registry,
    catalog: Catalog,
    publisher: Publisher,
    states: States,
    pins: Pins,
    sources: SourcePush,
) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    @router.post("/{name}/versions")
    async def publish(name: str, request: Request) -> Response:
        document = await json_object(request)
        if "source" in document:
            return await sources.answer(name, document, request)
        published = await publisher.publish(name, document, publisher_of(request.scope))
        location = {"location": f"/v1/models/{published.version.ref}"}
        return JSONResponse(published.to_json(), 201 if published.version.created else 200, headers=location)

    @router.get("")
    async def all_adapters() -> Response:
        look = await states.look()
        tags = await asyncio.to_thread(registry.tags.all)
        splits = await asyncio.to_thread(registry.splits.all)
        data = [
            _row(version, states, pins, look) | pointers(tags.get(version.name, {}), splits.get(version.name, {}))
            for version in await asyncio.to_thread(catalog.current)
        ]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/{name}")
    async def one_adapter(name: str) -> Response:
        versions = [catalog.fit(v) for v in await asyncio.to_thread(registry.versions, check_name(name))]
        current = next(version for version in versions if version.current)
        whole = await _whole(current, states, pins)
        tags = await asyncio.to_thread(registry.tags.of, name)
        split = await asyncio.to_thread(registry.splits.of, name)
        return JSONResponse(whole | pointers(tags, split) | {"versions": [_past(v, tags, split) for v in versions]})

    return router


def _row(version: Version, states: States, pins: Pins, look: Look) -> dict[str, Any]:
    pinned = pins.state_of(version.name)[0] is not None
    where = {"residency": states.place(version, look), "pinned": pinned}
    return summary(version, states.of(version)) | where


async def _whole(current: Version, states: States, pins: Pins) -> dict[str, Any]:
    residency = states.residency(current, await states.look())
    pinned = pins.state_of(current.name)[0] is not None
    return details(current, states.of(current)) | {"pinned": pinned, "residency": residency}


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
        "source": version.source,
        "state": "failed" if proof_state(version.proof) == "failed" else state,
        "proven": proof_state(version.proof),
    }


def pointers(tags: Mapping[str, int], split: Mapping[int, int]) -> dict[str, Any]:
    """What points at a name's versions besides the name."""
    return {"tags": dict(tags), "split": split_json(split)}


def details(current: Version, state: str) -> dict[str, Any]:
    """A name's current version with everything known of it."""
    return summary(current, state) | {
        "rank": current.rank,
        "reasons": reasons_json(current.reasons),
        "repairs": reasons_json(current.repairs),
        "stop_token_ids": list(current.stop_token_ids),
        "own_chat_template": current.chat_template is not None,
        "proof": current.proof or {"state": proof_state(None)},
    }


def _past(version: Version, tags: Mapping[str, int], split: Mapping[int, int]) -> dict[str, Any]:
    """One of a name's versions."""
    weight = split.get(version.number, 0)
    return {
        "version": version.number,
        "digest": version.digest,
        "kind": version.kind,
        "placement": version.placement,
        "size_bytes": version.size_bytes,
        "created_at": version.created_at.isoformat(),
        "current": version.current,
        "tags": [tag for tag, number in tags.items() if number == version.number],
        "share": round(weight / sum(split.values()), 6) if split else float(version.current),
        "proven": proof_state(version.proof),
        "proof": version.proof,
        "repairs": reasons_json(version.repairs),
        "source": version.source,
        "publisher": version.publisher,
    }
