"""From exception types to HTTP: the one place where status codes are chosen, and the OpenAI error shape is made.

{"error": {"message", "type", "param", "code", "source": "gateway" | "engine", …}}
"""

import errno
import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any, get_args

import sqlalchemy as sa
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from loradock_adapters import errors as adapters
from loradock_adapters.errors import LoradockError
from loradock_serve import errors as serve

log = logging.getLogger("loradock.gateway")

MAX_LOGGED_CHARS = 200
UNFORESEEN = "Something went wrong inside the gateway; its log has the details"
STATUS: Mapping[type[Exception], int] = {
    serve.BadRequestError: 400,
    serve.UnauthorizedError: 401,
    serve.ForbiddenError: 403,
    serve.ModelNotFoundError: 404,
    serve.ConflictError: 409,
    serve.UploadStalledError: 408,
    serve.LengthRequiredError: 411,
    serve.TooLargeError: 413,
    serve.QueueFullError: 429,
    serve.TooManyUploadsError: 429,
    serve.DeadlineError: 504,
    serve.StorageFullError: 507,
    serve.SourceNotAllowedError: 403,
    serve.SourceNotFoundError: 404,
    serve.SourceDeniedError: 403,
    serve.SourceTooLargeError: 413,
    serve.SourceBusyError: 429,
    serve.SourcePendingError: 503,
    serve.SourceUnavailableError: 503,
    serve.EngineRouteError: 404,
    serve.EngineRefusedError: 422,
    serve.EngineUnavailableError: 503,
    serve.EngineError: 502,
    adapters.StoreUnavailableError: 503,
    adapters.RegistryUnavailableError: 503,
    adapters.CorruptBlobError: 502,
    adapters.InvalidNameError: 400,
    adapters.InvalidSourceError: 400,
    adapters.ManifestError: 400,
    adapters.DigestMismatchError: 400,
    adapters.NotFoundError: 404,
    adapters.MissingBlobsError: 409,
    adapters.UploadQuotaError: 413,
    adapters.WrongOffsetError: 416,
    adapters.UploadBusyError: 423,
    adapters.NoRoomError: 507,
    adapters.InUseError: 409,
    adapters.UsageError: 400,
    adapters.RefusedError: 422,
}
TYPE: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    416: "invalid_request_error",
    422: "invalid_request_error",
    423: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "storage_error",
}
UPLOAD_OFFSET = "upload-offset"
"""How much of a content is here; the next piece begins there."""
_SOON = (
    serve.EngineUnavailableError
    | serve.QueueFullError
    | serve.TooManyUploadsError
    | serve.SourceBusyError
    | serve.SourcePendingError
    | serve.SourceUnavailableError
    | adapters.UploadBusyError
    | adapters.StoreUnavailableError
    | adapters.RegistryUnavailableError
)
AWAY = sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError
"""A database that does not answer, or no more, or has no connection left."""
REGISTRY_RETRY_S = 5


def status_of(error: Exception) -> int:
    """The status of the nearest ancestor in `STATUS`; 500 where there is none."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def error_object(error: LoradockError) -> dict[str, Any]:
    """What stands under `error` in the answer."""
    status = status_of(error)
    body: dict[str, Any] = {
        "message": str(error),
        "type": TYPE.get(status, "server_error"),
        "param": getattr(error, "param", None),
        "code": error.code,
        "source": "gateway",
    }
    if isinstance(error, adapters.RefusedError | serve.UnfitError | serve.ProofFailedError):
        body["problems"] = [problem.to_json() for problem in error.problems]
    if isinstance(error, adapters.MissingBlobsError):
        body["missing"] = list(error.missing)
    if isinstance(error, adapters.WrongOffsetError):
        body["offset_bytes"] = error.held_bytes
    return body


def headers_of(error: LoradockError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, adapters.WrongOffsetError):
        return {UPLOAD_OFFSET: str(error.held_bytes)}
    if isinstance(error, serve.UploadStalledError):
        return {"connection": "close"}
    if isinstance(error, _SOON):
        return {"retry-after": str(error.retry_after_s)}
    if isinstance(error, serve.UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, serve.ConflictError | adapters.MissingBlobsError | adapters.InUseError):
        # The OpenAI client retries every 409 by itself; these stay what they are.
        return {"x-should-retry": "false"}
    return {}


def explained(error: Exception) -> LoradockError | None:
    """What an error that the gateway did not raise itself means for a client; None where only the log can say."""
    if isinstance(error, AWAY):
        cause = getattr(error, "orig", None)
        if not (isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode == sqlite3.SQLITE_FULL):
            return adapters.RegistryUnavailableError(
                "The registry's database does not answer at the moment. Models that this server knows already keep "
                f"answering; try again in {REGISTRY_RETRY_S} s",
                retry_after_s=REGISTRY_RETRY_S,
            )
    elif not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return None
    return serve.StorageFullError(
        "The server's disk is full: nothing that was there is lost, and what came of an upload is kept. Free some room "
        "under its `data_dir`, then send this again"
    )


def log_refusal(scope: Scope, error: LoradockError) -> None:
    """One line for a request that is answered with an error: what was asked, by whom, and the error's code."""
    client = scope.get("client")
    codes = error.code
    if isinstance(error, adapters.RefusedError):
        codes += f" ({', '.join(dict.fromkeys(problem.code for problem in error.problems))})"
    path = ascii(scope["path"][:MAX_LOGGED_CHARS])[1:-1]  # it may be any text of any length
    log.warning("%s %s %s %s, from %s", scope["method"], path, status_of(error), codes, client[0] if client else "-")


def add_handlers(app: FastAPI) -> None:
    """Have every error of the application's routes leave it in OpenAI's shape."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, LoradockError)
        log_refusal(request.scope, error)
        return error_response(error)

    async def of_the_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = error_response(serve.BadRequestError(message, code="unknown_route"))
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response

    async def hung_up(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def perhaps_full(request: Request, error: Exception) -> Response:
        if (explanation := explained(error)) is None:
            raise error
        log_refusal(request.scope, explanation)
        log.error("%s: %s", type(error).__name__, error)
        return error_response(explanation)

    async def unforeseen(_request: Request, _error: Exception) -> Response:
        # Starlette raises it once more behind this answer, so that the server logs its traceback.
        return error_response(serve.GatewayError(UNFORESEEN))

    app.add_exception_handler(LoradockError, ours)
    app.add_exception_handler(HTTPException, of_the_framework)
    app.add_exception_handler(ClientDisconnect, hung_up)
    app.add_exception_handler(OSError, perhaps_full)
    for kind in get_args(AWAY):
        app.add_exception_handler(kind, perhaps_full)
    app.add_exception_handler(Exception, unforeseen)


def error_response(error: LoradockError) -> Response:
    """The whole answer for an error."""
    body = json.dumps({"error": error_object(error)}).encode()
    return Response(body, status_of(error), headers=headers_of(error), media_type="application/json")
