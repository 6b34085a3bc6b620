"""`GET /v1/base`: what adapters are judged by here: the base's modules, and the limits of its engine.

With it `loradock check --server` says before a training what would become of its checkpoint.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response


def base_router(describe: Callable[[], dict[str, Any]]) -> APIRouter:
    """The route. `describe` may sort many names, and runs in a thread."""
    router = APIRouter(prefix="/v1/base")

    @router.get("")
    async def base() -> Response:
        return JSONResponse(await asyncio.to_thread(describe))

    return router
