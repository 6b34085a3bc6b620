"""`/v1/adapters/blobs`: the bytes of an upload, one content at a time.

The HTTP side only: how contents are kept is the store's.
"""

import asyncio
import re

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.store import LocalStore
from loradock_serve.errors import BadRequestError, LengthRequiredError, TooLargeError
from loradock_serve.metrics import UPLOADED_BYTES

SHA256 = re.compile(r"[0-9a-f]{64}")
WRITE_AT_ONCE_BYTES = 4 * 1024**2
"""Chunks are gathered up to this size before a thread writes and hashes them: a thread hop for 64 KiB costs more than
the work."""


def blobs_router(store: LocalStore, *, max_upload_bytes: int) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    @router.head("/blobs/{sha256}")
    async def has_blob(sha256: str) -> Response:
        return Response(status_code=200 if store.has_blob(_sha256(sha256)) else 404)

    @router.put("/blobs/{sha256}")
    async def put_blob(sha256: str, request: Request) -> Response:
        size = _announced_size(request, max_upload_bytes)
        if store.has_blob(_sha256(sha256)):
            return JSONResponse({"sha256": sha256, "stored": False})
        await _receive(store, sha256, size, request)
        UPLOADED_BYTES.inc(size)
        return JSONResponse({"sha256": sha256, "stored": True}, 201)

    return router


def _sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise BadRequestError("A blob is named by the 64 lower-case hex digits of its sha256", param="sha256")
    return text


def _announced_size(request: Request, limit_bytes: int) -> int:
    """The body's size from its header, checked before a byte is read."""
    text = request.headers.get("content-length", "")
    if not text.isdigit():
        raise LengthRequiredError("An upload needs a Content-Length header")
    if int(text) > limit_bytes:
        raise TooLargeError(f"A file of {text} bytes is over this server's limit of {limit_bytes} (`max_upload_bytes`)")
    return int(text)


async def _receive(store: LocalStore, sha256: str, size: int, request: Request) -> None:
    """Stream the body into the store; nothing is visible unless size and hash agree at the end."""
    writer = await asyncio.to_thread(store.writer, sha256, size)
    try:
        gathered = bytearray()
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= WRITE_AT_ONCE_BYTES:
                await asyncio.to_thread(writer.write, bytes(gathered))
                gathered.clear()
        await asyncio.to_thread(writer.write, bytes(gathered))
        await asyncio.to_thread(writer.commit)
    finally:
        await asyncio.to_thread(writer.abort)  # harmless after a commit
