"""`GET /v1/plan`: what this server's next start would choose for itself, and what runs now."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loradock_serve.plan import plan_json
from loradock_serve.sizing import Advice


def plan_router(
    make: Callable[[], Advice | None], running: Advice | None, write_traffic: Callable[[], Awaitable[None]]
) -> APIRouter:
    """The route. `make` plans anew, and reads the registry; `running` is what our own engine was started with."""
    router = APIRouter(prefix="/v1/plan")

    @router.get("")
    async def plan() -> Response:
        await write_traffic()
        advice = await asyncio.to_thread(make)
        now = None if running is None else plan_json(running)
        return JSONResponse({"plan": None if advice is None else plan_json(advice), "running": now})

    return router
