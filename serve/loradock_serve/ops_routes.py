"""What operators and load balancers ask: is the gateway alive, does the base answer, what has been counted."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from loradock_serve import metrics
from loradock_serve.adapter_gauges import AdapterGauges
from loradock_serve.engine import AttachedEngine, EngineStart
from loradock_serve.errors import EngineUnavailableError
from loradock_serve.fleet import Fleet
from loradock_serve.http_errors import error_response
from loradock_serve.turnstile import Turnstiles

ATTACHED_LOOK_S = 0.5


def ops_router(fleet: Fleet, adapters: AdapterGauges, turnstiles: Turnstiles) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter()

    @router.head("/livez")  # what monitors and `wget --spider` ask with
    @router.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "alive"})

    @router.head("/health")
    @router.get("/health")
    async def health() -> Response:
        try:
            start = fleet.base.current or await _look_at_attached(fleet)
            healthy = start is not None and await start.client.is_healthy() is not False
        except EngineUnavailableError:
            healthy = False
        if healthy:
            return JSONResponse({"status": "healthy"})
        fleet.base.suspect()
        return error_response(_unhealthy(fleet))

    @router.head("/metrics")
    @router.get("/metrics")
    async def prometheus() -> Response:
        metrics.ENGINE_UP.set(fleet.base.state == "ready")
        metrics.ENGINE_STARTS.set(fleet.base.starts)
        turnstiles.observe(fleet.base)
        await adapters.set()
        return Response(generate_latest(metrics.REGISTRY), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def _unhealthy(fleet: Fleet) -> EngineUnavailableError:
    """State, code and one line: the route is open to anybody, and an engine's log may hold paths and secrets."""
    failure = fleet.base.failure
    why = f": {failure.summary}" if failure is not None and failure.summary else ""
    error = EngineUnavailableError(f"The base's engine is {fleet.base.state}{why}")
    error.code = failure.code if failure is not None else error.code
    return error


async def _look_at_attached(fleet: Fleet) -> EngineStart | None:
    """Nothing watches an attached engine between requests, so a health check looks for itself."""
    return await fleet.base.ensure_ready(ATTACHED_LOOK_S) if isinstance(fleet.base, AttachedEngine) else None
