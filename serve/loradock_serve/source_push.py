"""`POST /v1/adapters/{name}/versions` with `{"source": "hf://…"}`: the server fetches, and publishes as an upload.

Answered like an upload where it is done soon; else 202 with how far it is and the fetch's id, and the client sends the
same with that id until it is done. Nothing else is needed to go on after a broken connection: the same request without
the id waits for the same fetch while it runs, and is a no-op once its commit is published.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from loradock_adapters.source_ref import HUB, SourceRef, parse_source
from loradock_serve.auth import publisher_of
from loradock_serve.config import SourcesConfig
from loradock_serve.errors import BadRequestError
from loradock_serve.publish import Options, Published, Publisher
from loradock_serve.source_jobs import Job, Order, SourceJobs

TOKEN_HEADER = "x-loradock-source-token"
MAX_TOKEN_CHARS = 512
WAIT_S = 30.0
MAX_WAIT_S = 300.0
AGAIN_AFTER_S = 1


class SourcePush:
    """See the top of the file."""

    def __init__(self, config: SourcesConfig, jobs: SourceJobs, publisher: Publisher) -> None:
        self._config = config
        self._jobs = jobs
        self._publisher = publisher

    async def answer(self, name: str, document: Mapping[str, Any], request: Request) -> Response:
        """The answer to one request. Raises what a publish raises, InvalidSourceError or SourceError."""
        self._publisher.check_name(name)
        order = self._order(name, document, request)
        job = self._known_job(document.get("fetch"), order) or self._jobs.ensure(order)
        published = await job.wait(_wait_s(request.headers.get("prefer", "")))
        return _done(published) if published is not None else _under_way(job)

    def _order(self, name: str, document: Mapping[str, Any], request: Request) -> Order:
        if "files" in document:
            raise BadRequestError("A publish has either `files` or a `source`, not both", param="source")
        source = document["source"]
        if not isinstance(source, str):
            raise BadRequestError('`source` is an address: "hf://org/repo@revision"', param="source")
        ref = parse_source(source)
        rest = {key: value for key, value in document.items() if key not in ("source", "fetch")}
        token = _token(request.headers.get(TOKEN_HEADER), ref)
        return Order(name, ref, self._config.push, Options.of(rest, publisher_of(request.scope)), token)

    def _known_job(self, job_id: object, order: Order) -> Job | None:
        """The fetch that the client waited for already. One that is not known any more begins anew."""
        if job_id is None:
            return None
        if not isinstance(job_id, str):
            raise BadRequestError("`fetch` is the id that a 202 had", param="fetch")
        return self._jobs.ended_or_running(job_id, order.name, order.ref)


def _token(text: str | None, ref: SourceRef) -> str | None:
    """A request's token for the source. Nothing of it is in any message."""
    if not text:
        return None
    if ref.scheme != HUB:
        raise BadRequestError(
            f"{TOKEN_HEADER} is for {HUB}:// sources; a {ref.scheme}:// one is read with the server's own credentials",
            param=TOKEN_HEADER,
        )
    if len(text) > MAX_TOKEN_CHARS or not text.isascii() or not text.isprintable() or " " in text:
        raise BadRequestError(f"{TOKEN_HEADER} holds no token: printable ASCII without spaces", param=TOKEN_HEADER)
    return text


def _wait_s(prefer: str) -> float:
    """How long the client would wait for the end: `Prefer: wait=SECONDS` (RFC 7240)."""
    for preference in prefer.split(","):
        key, _, value = preference.strip().partition("=")
        if key.lower() == "wait" and value.isdigit() and len(value) < 6:
            return min(float(value), MAX_WAIT_S)
    return WAIT_S


def _done(published: Published) -> Response:
    location = {"location": f"/v1/models/{published.version.ref}"}
    return JSONResponse(published.to_json(), 201 if published.version.created else 200, headers=location)


def _under_way(job: Job) -> Response:
    order, watch = job.order, job.watch
    about: dict[str, Any] = {"name": order.name, "source": str(order.ref), "state": "fetching", "fetch": job.id}
    about |= {"done_bytes": watch.done_bytes, "total_bytes": watch.total_bytes}
    return JSONResponse(about, 202, headers={"retry-after": f"{AGAIN_AFTER_S}"})
