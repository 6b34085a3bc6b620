"""`POST /v1/adapters/gc`: free the disk of what no name has any more. What that is, `collector.py` decides."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_serve.collector import Collector
from loradock_serve.errors import BadRequestError
from loradock_serve.json_body import json_object


def gc_router(collector: Collector) -> APIRouter:
    """The route, bound to its part."""
    router = APIRouter(prefix="/v1/adapters")

    @router.post("/gc")
    async def collect(request: Request) -> Response:
        document = await json_object(request, may_be_missing=True)
        dry_run = document.get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise BadRequestError("`dry_run` is true or false", param="dry_run")
        return JSONResponse((await collector.collect(dry_run=dry_run)).to_json())

    return router
