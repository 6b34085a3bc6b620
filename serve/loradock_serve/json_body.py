"""A request's JSON object, read with a limit. Knows nothing of what is in it."""

from typing import Any

from fastapi import Request

from loradock_adapters import strict_json
from loradock_serve.errors import BadRequestError, TooLargeError

MAX_BODY_BYTES = 1024**2


async def json_object(request: Request, *, may_be_missing: bool = False) -> dict[str, Any]:
    """Raises TooLargeError, or BadRequestError where the body is no JSON object.

    Where the body `may_be_missing`, no body is an empty object.
    """
    gathered = bytearray()
    async for chunk in request.stream():
        gathered += chunk
        if len(gathered) > MAX_BODY_BYTES:
            raise TooLargeError(f"The body is over the limit of {MAX_BODY_BYTES} bytes")
    if may_be_missing and not gathered:
        return {}
    try:
        data = strict_json.loads(bytes(gathered))
    except ValueError as error:
        message = f"The body is not valid JSON: {ascii(str(error))[1:-1][:200]}"
        raise BadRequestError(message, param="body", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequestError("The body must be a JSON object", param="body", code="invalid_json")
    return data
