"""`/v1/models`: list, one, delete, in OpenAI's shapes with a `loradock` object in each entry."""

import asyncio

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loradock_adapters.errors import NotFoundError
from loradock_serve.catalog import Catalog, version_card
from loradock_serve.errors import ConflictError, ModelNotFoundError
from loradock_serve.pointers import Pointers
from loradock_serve.states import States


def models_router(catalog: Catalog, pointers: Pointers, states: States) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/models")

    @router.get("")
    async def list_models() -> Response:
        current = await asyncio.to_thread(catalog.current)
        return JSONResponse({"object": "list", "data": catalog.cards(current, states.base, states.of)})

    # `:path` because ids may hold slashes (a Hub id); the OpenAI client sends them as %2F.
    @router.get("/{model:path}")
    async def one_model(model: str) -> Response:
        await catalog.know(model)
        resolved = catalog.resolve(model)
        if resolved.version is None:
            return JSONResponse(catalog.base_card(states.base) | {"id": model})
        return JSONResponse(version_card(resolved.version, model, states.of(resolved.version)))

    @router.delete("/{model:path}")
    async def delete_model(model: str) -> Response:
        await catalog.know(model)
        resolved = catalog.resolve(model)
        if resolved.version is None:
            raise ConflictError(f"{model!r} is the base of this server and cannot be deleted")
        if model != resolved.version.name:
            raise ConflictError(f"Name the model itself ({resolved.version.name!r}) to delete it with all its versions")
        try:
            await pointers.remove(model)
        except NotFoundError:
            raise ModelNotFoundError(model) from None
        return JSONResponse({"id": model, "object": "model", "deleted": True})

    return router
