"""`/v1/adapters/{name}/pin`: have an adapter keep its slot, and let it go again."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loradock_adapters.names import check_name
from loradock_adapters.registry import Version
from loradock_serve.pins import Pins
from loradock_serve.states import States

WAIT_S = 30.0
"""How long an answer waits for the adapter to be in its slot; then it says that it is on its way (202)."""


def pins_router(pins: Pins, states: States) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    @router.post("/{name}/pin")
    async def pin(name: str) -> Response:
        version = await pins.pin(check_name(name), WAIT_S)
        held = pins.state_of(name)[0] == "held"
        residency = states.residency(version, await states.look())
        return JSONResponse(pin_summary(version) | {"pinned": True, "residency": residency}, 200 if held else 202)

    @router.delete("/{name}/pin")
    async def unpin(name: str) -> Response:
        was_pinned = await pins.unpin(check_name(name))
        return JSONResponse({"name": name, "pinned": False, "was_pinned": was_pinned})

    return router


def pin_summary(version: Version) -> dict[str, Any]:
    """A name whose pin was changed."""
    return {"name": version.name, "current_version": version.number, "digest": version.digest}
