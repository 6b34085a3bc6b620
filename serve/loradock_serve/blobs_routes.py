"""`/v1/adapters/blobs`: the bytes of an upload, one content at a time, resumable.

Everything is decided from the headers, before a byte is read. The protocol is in docs/adapters.md. The HTTP side only:
how contents are kept is the store's and `loradock_adapters.uploads`'s.
"""

import asyncio
import re
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import Upload, Uploads
from loradock_serve.auth import publisher_of
from loradock_serve.config import ServeConfig
from loradock_serve.errors import BadRequestError, LengthRequiredError, TooLargeError
from loradock_serve.http_errors import UPLOAD_OFFSET
from loradock_serve.metrics import UPLOADED_BYTES
from loradock_serve.receiving import Parallel, receive

SHA256 = re.compile(r"[0-9a-f]{64}")
CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,20})-([0-9]{1,20})|\*)/([0-9]{1,20})")
NUMBER = re.compile(r"[0-9]{1,20}")
UPLOAD_LENGTH = "upload-length"
WRITERS = 8


@dataclass(frozen=True)
class Piece:
    """What an upload's headers say of its body."""

    offset: int | Literal["end"] | None
    """Where it goes on; None for a whole content, which begins anew; "end" for one that only asks."""
    size_bytes: int
    total_bytes: int


def blobs_router(store: LocalStore, uploads: Uploads, config: ServeConfig) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")
    # Of their own: who resumes gigabytes has them hashed again, and nobody else's threads may wait for that.
    writers = ThreadPoolExecutor(WRITERS, "loradock-upload")
    parallel = Parallel(config.uploads.max_parallel)

    @router.head("/blobs/{sha256}")
    async def has_blob(sha256: str, request: Request) -> Response:
        publisher = publisher_of(request.scope)
        announced = request.headers.get(UPLOAD_LENGTH)
        total_bytes = None if announced is None else _number(announced, "Upload-Length")
        if await asyncio.to_thread(store.has_blob, _sha256(sha256)):
            return Response(status_code=200)
        if total_bytes is not None:
            _check_size(total_bytes, config.max_upload_bytes)
            await asyncio.to_thread(uploads.check, publisher, sha256, total_bytes)
        held_bytes = await asyncio.to_thread(uploads.held_bytes, publisher, sha256, total_bytes)
        return Response(status_code=404, headers={UPLOAD_OFFSET: str(held_bytes), "cache-control": "no-store"})

    @router.put("/blobs/{sha256}")
    async def put_blob(sha256: str, request: Request) -> Response:
        publisher = publisher_of(request.scope)
        piece = _piece(request)
        _check_size(piece.total_bytes, config.max_upload_bytes)
        if await asyncio.to_thread(store.has_blob, _sha256(sha256)):
            return JSONResponse({"sha256": sha256, "stored": False})
        with parallel.turn(publisher):
            begin = partial(uploads.begin, publisher, sha256, piece.total_bytes, piece.offset)
            upload = await asyncio.get_running_loop().run_in_executor(writers, begin)
            try:
                return await _receive(upload, request, writers, config.uploads.stall_s)
            finally:
                upload.close()

    return router


async def _receive(upload: Upload, request: Request, writers: Executor, stall_s: float) -> Response:
    """The body into the upload; into the store with it once it is whole."""
    before_bytes = upload.held_bytes
    try:
        await receive(upload, request.stream(), writers, stall_s)
    finally:
        UPLOADED_BYTES.inc(upload.held_bytes - before_bytes)
    if upload.missing_bytes:
        there = {"sha256": upload.sha256, "stored": False, "offset_bytes": upload.held_bytes}
        return JSONResponse(there, 202, headers={UPLOAD_OFFSET: str(upload.held_bytes)})
    await asyncio.get_running_loop().run_in_executor(writers, upload.finish)
    return JSONResponse({"sha256": upload.sha256, "stored": True}, 201)


def _sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise BadRequestError("A blob is named by the 64 lower-case hex digits of its sha256", param="sha256")
    return text


def _number(text: str, header: str) -> int:
    if not NUMBER.fullmatch(text):
        raise BadRequestError(f"{header} is a number of bytes, not {ascii(text)[:40]}", param=header)
    return int(text)


def _piece(request: Request) -> Piece:
    """What comes, from the headers."""
    length = request.headers.get("content-length")
    if length is None:
        raise LengthRequiredError("An upload needs a Content-Length header")
    size_bytes = _number(length, "Content-Length")
    text = request.headers.get("content-range")
    if text is None:
        return Piece(None, size_bytes, size_bytes)
    match = CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise BadRequestError(
            f"Content-Range is `bytes FIRST-LAST/TOTAL`, or `bytes */TOTAL` to ask, not {ascii(text)[:80]}",
            param="Content-Range",
        )
    total_bytes = int(match[3])
    first, end = (int(match[1]), int(match[2]) + 1) if match[1] is not None else (0, 0)
    if not first <= end <= total_bytes or end - first != size_bytes:
        raise BadRequestError(
            f"Content-Range {ascii(text)[1:-1][:80]} and Content-Length {size_bytes} cannot be true together",
            param="Content-Range",
        )
    return Piece("end" if match[1] is None else first, size_bytes, total_bytes)


def _check_size(total_bytes: int, limit_bytes: int) -> None:
    if total_bytes > limit_bytes:
        raise TooLargeError(
            f"A file of {total_bytes} bytes is over this server's limit of {limit_bytes} (`max_upload_bytes`)"
        )
