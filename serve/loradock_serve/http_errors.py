"""From exception types to HTTP: the one place where status codes are chosen, and the OpenAI error shape is made.

{"error": {"message", "type", "param", "code", "source": "gateway" | "engine", …}}
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from loradock_adapters import errors as adapters
from loradock_adapters.errors import LoradockError
from loradock_serve import errors as serve

STATUS: Mapping[type[Exception], int] = {
    serve.BadRequestError: 400,
    serve.UnauthorizedError: 401,
    serve.ForbiddenError: 403,
    serve.ModelNotFoundError: 404,
    serve.ConflictError: 409,
    serve.TooLargeError: 413,
    serve.DeadlineError: 504,
    serve.EngineRouteError: 404,
    serve.EngineRefusedError: 422,
    serve.EngineUnavailableError: 503,
    serve.EngineError: 502,
    adapters.InvalidNameError: 400,
    adapters.ManifestError: 400,
    adapters.DigestMismatchError: 400,
    adapters.NotFoundError: 404,
    adapters.MissingBlobsError: 409,
    adapters.RefusedError: 422,
}
TYPE: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


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
    if isinstance(error, adapters.RefusedError):
        body["problems"] = [problem.to_json() for problem in error.problems]
    if isinstance(error, adapters.MissingBlobsError):
        body["missing"] = list(error.missing)
    return body


def headers_of(error: LoradockError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, serve.EngineUnavailableError):
        return {"retry-after": str(error.retry_after_s)}
    if isinstance(error, serve.UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, serve.ConflictError | adapters.MissingBlobsError):
        # The OpenAI client retries every 409 by itself; these stay what they are.
        return {"x-should-retry": "false"}
    return {}


def error_response(error: LoradockError) -> Response:
    """The whole answer for an error."""
    body = json.dumps({"error": error_object(error)}).encode()
    return Response(body, status_of(error), headers=headers_of(error), media_type="application/json")
