"""The OpenAI routes: one request, from its body to the last byte of its answer.

    body ▶ model ▶ version ▶ lease of an engine (held while it starts) ▶ its turn on it ▶ engine over its socket ▶ bytes
    back, as they come ▶ meter

Plain ASGI, because it is the hot path and because both ends of a connection must be watched at once: a client that
hangs up aborts its request in the engine, an engine that dies ends the stream with an error event. Knows nothing of
uploads.
"""

import asyncio
import logging
import random
import time

from starlette.types import Receive, Scope, Send

from loradock_adapters.errors import LoradockError
from loradock_adapters.source_ref import is_source
from loradock_serve import metrics, rewrite
from loradock_serve.asks import ask_of, caller_of, check_n, timeout_of
from loradock_serve.auth import key_of
from loradock_serve.catalog import Catalog, Resolved, refuse_unfit, refuse_wrong_task
from loradock_serve.comments import Comments
from loradock_serve.cut_short import ClientGoneError, CutShort
from loradock_serve.engine_http import Answer, EngineGoneError
from loradock_serve.errors import (
    EngineError,
    EngineRouteError,
    EngineUnavailableError,
    GatewayError,
    TooLargeError,
)
from loradock_serve.fleet import Fleet
from loradock_serve.header_fields import header_fields, header_text
from loradock_serve.http_errors import UNFORESEEN, explained, status_of
from loradock_serve.lazy_models import LazyModels
from loradock_serve.leases import Target
from loradock_serve.log_lines import RequestLog
from loradock_serve.reply import Reply
from loradock_serve.sse import Usage
from loradock_serve.tickets import Ask
from loradock_serve.turnstile import Turn, Turnstiles
from loradock_serve.waiting_room import WaitingRoom

REQUESTS = RequestLog(logging.getLogger("loradock.requests"))

EXAMINED_WITHIN_S = 1.0
MAX_ERROR_BYTES = 64 * 1024
TRACING = (b"traceparent", b"tracestate")
"""Headers that go on to the engine as they are."""
MAX_REQUEST_ID_CHARS = 128
MAX_NAME_CHARS = 200
NO_ROUTE = {"Not Found", "Method Not Allowed"}
"""What an engine says of a path that it does not have: some of its routers as the error's type, some as its message."""


class OpenAIProxy:
    """The ASGI endpoint of every OpenAI route that runs a model."""

    def __init__(
        self,
        catalog: Catalog,
        fleet: Fleet,
        turnstiles: Turnstiles,
        lazy: LazyModels,
        room: WaitingRoom,
        *,
        max_body_bytes: int,
        timeout_s: float,
        max_n: int,
    ) -> None:
        self._catalog = catalog
        self._fleet = fleet
        self._turnstiles = turnstiles
        self._lazy = lazy
        self._room = room
        self._max_body_bytes = max_body_bytes
        self._max_n = max_n
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        began = time.monotonic()
        reply = Reply(send, _request_id(scope))
        status = 500  # what stays if something happens that nobody thought of
        metrics.IN_FLIGHT.count += 1
        try:
            timeout_s, whose = timeout_of(header_text(scope, b"x-request-timeout"), self._timeout_s)
            with CutShort(reply, timeout_s, whose) as cut:
                body = await read_body(receive, self._max_body_bytes, header_text(scope, b"content-length"))
                cut.watch(scope, receive)
                await self._answer(scope, reply, body, began + timeout_s)
            status = reply.status
        except ClientGoneError:
            status = metrics.CLIENT_GONE
        except asyncio.CancelledError:  # the server ends, and has waited long enough for this request
            stopping = EngineUnavailableError("This server is being stopped; ask again when it is back")
            status = status_of(stopping)
            await reply.fail(stopping)
            raise
        except Exception as error:
            known = error if isinstance(error, LoradockError) else explained(error)
            status = status_of(known) if known is not None else 500
            await reply.fail(known or GatewayError(UNFORESEEN))
            if known is None:
                raise  # the server logs its traceback
            # Others may be told of the same error (lazy_models.py remembers it): nothing of this request, whose frames
            # have its body, is to live as long.
            error.__traceback__ = None
        finally:
            metrics.IN_FLIGHT.count -= 1
            seconds = time.monotonic() - began
            metrics.count_request(scope["path"], status, seconds)
            if reply.version is not None:
                broken = status == 200 and reply.error_code is not None  # after the head of a stream
                metrics.count_version(reply.version, 500 if broken else status, seconds)
            outcome = f"{status}" if reply.error_code is None else f"{status} {_shown(reply.error_code)}"
            REQUESTS.info("%s %s %s %.3fs %s", scope["path"], _shown(reply.model), outcome, seconds, reply.request_id)

    async def _answer(self, scope: Scope, reply: Reply, body: bytes, deadline_at: float) -> None:
        path = scope["path"]
        payload = rewrite.parse_body(body)
        reply.model = rewrite.model_of(payload)
        if is_source(reply.model):
            with self._room.place(len(body)) as place:
                place.take()
                resolved = await self._lazy.resolve(reply.model)
        else:
            found = await self._catalog.find(reply.model)
            resolved = self._catalog.route(found, lambda: caller_of(payload, key_of(scope)))
        reply.version = resolved.version
        refuse_unfit(resolved.version)
        refuse_wrong_task(resolved.version, resolved.public_name, path)
        out = rewrite.outgoing(path, payload, resolved.engine_name, resolved.public_name, resolved.behaviour, body)
        check_n(payload, self._max_n)
        ask = ask_of(payload, len(body), resolved.version.digest if resolved.version else None, deadline_at)
        with self._fleet.answering(resolved.version):
            if not await self._attempt(scope, reply, resolved, out, ask):
                # The engine did not know the adapter: something else restarted it, or a removal overtook this request.
                await self._attempt(scope, reply, resolved, out, ask, last=True)

    async def _attempt(
        self, scope: Scope, reply: Reply, resolved: Resolved, out: rewrite.Outgoing, ask: Ask, *, last: bool = False
    ) -> bool:
        """False where the engine does not know the adapter, and nothing has been answered."""
        arrived_at: float | None = None
        with self._room.place(len(out.body)) as place:
            place.take()
            async with Comments(reply, f"waiting for the engine of {resolved.public_name}", wanted=out.streams) as said:
                while True:
                    async with self._fleet.lease(resolved.version) as target:
                        place.reach_engine()
                        async with self._turnstiles.turn(target, ask, arrived_at) as turn:
                            if turn.is_current:
                                place.leave()
                                await said.stop()
                                return await self._exchange(scope, reply, resolved, out, target, turn, last=last)
                            # Its engine ended while it waited: it keeps its age on the next start.
                            arrived_at = turn.arrived_at

    async def _exchange(
        self,
        scope: Scope,
        reply: Reply,
        resolved: Resolved,
        out: rewrite.Outgoing,
        target: Target,
        turn: Turn,
        *,
        last: bool,
    ) -> bool:
        """As `_attempt`, on an engine that is ready and has the adapter, with a turn on it."""
        path = scope["path"]
        reply.queue_s = turn.waited_s
        try:
            async with target.client.post(path, out.body, _engine_headers(scope, reply.request_id)) as answer:
                if answer.status != 200:
                    text = await answer.read(MAX_ERROR_BYTES)
                    if not last and resolved.is_adapter and _is_unknown(resolved.engine_name, answer.status, text):
                        self._fleet.lost(target)
                        return False
                    await _pass_error(answer.status, text, target, out, reply, path)
                elif answer.content_type == "text/event-stream":
                    await _stream(answer, target, out, reply, turn)
                else:
                    await _whole(answer, out, reply, turn)
        except EngineGoneError as error:
            await target.engine.examine(EXAMINED_WITHIN_S)
            raise EngineUnavailableError(
                f"The engine of {resolved.public_name!r} went away while it was answering; it is being restarted"
            ) from error
        return True


def _is_unknown(engine_name: str, status: int, text: bytes) -> bool:
    """Whether the engine says that it has no such model; its other reasons for a 404 (a `previous_response_id` that it
    does not know) are the client's business."""
    return status == 404 and engine_name.encode() in text


async def _pass_error(status: int, text: bytes, target: Target, out: rewrite.Outgoing, reply: Reply, path: str) -> None:
    if status >= 500 and await target.client.is_healthy() is False:
        target.engine.suspect()
        raise EngineUnavailableError(f"The engine of {out.public_name!r} died; it is being restarted")
    error = rewrite.engine_error(text, out)
    if status in (404, 405) and {error["type"], error["message"]} & NO_ROUTE:
        hint = f"; it writes text: ask {rewrite.CHAT} or {rewrite.COMPLETIONS}" if path == rewrite.CLASSIFY else ""
        raise EngineRouteError(f"The engine of {out.public_name!r} has no {path}: its model does another task{hint}")
    if not 400 <= status < 600:
        raise EngineError(f"The engine of {out.public_name!r} answered with status {status}")
    await reply.fail_with(status, error)


async def _stream(answer: Answer, target: Target, out: rewrite.Outgoing, reply: Reply, turn: Turn) -> None:
    rewriter = out.rewriter()
    await reply.start_stream()
    try:
        while chunk := await answer.chunk():
            if data := rewriter.feed(chunk):
                await reply.write(data)
            if rewriter.error is not None:
                break
    except EngineGoneError:
        if not rewriter.ended_well:  # the answer was complete: what died after it is not its client's business
            raise
    finally:
        _meter(out, rewriter.usage, turn)
    if rewriter.error is not None:
        target.engine.suspect()
        await reply.fail_with(500, rewrite.public_error(rewriter.error, out))
    elif not rewriter.ended_well:
        target.engine.suspect()
        raise EngineError("The engine ended the stream before it was complete")
    else:
        await reply.end()


async def _whole(answer: Answer, out: rewrite.Outgoing, reply: Reply, turn: Turn) -> None:
    body, figures = rewrite.incoming(await answer.read(), out)
    usage = Usage()
    usage.take(figures)
    _meter(out, usage, turn)
    await reply.whole(body, answer.headers.get(b"content-type", b"application/json").decode("latin-1"))


def _meter(out: rewrite.Outgoing, usage: Usage, turn: Turn) -> None:
    if usage.prompt_tokens or usage.completion_tokens:
        turn.usage = (usage.prompt_tokens, usage.completion_tokens)
        metrics.meter(out.public_name, usage.prompt_tokens, usage.completion_tokens)


async def read_body(receive: Receive, limit_bytes: int, announced: str) -> bytes:
    """The whole request body. TooLargeError, from the header where it is announced; ClientGoneError where it breaks
    off."""
    if announced.isdigit() and int(announced) > limit_bytes:
        raise TooLargeError(f"The body is {announced} bytes, over the limit of {limit_bytes} (`max_body_bytes`)")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit_bytes:
            raise TooLargeError(f"The body is over the limit of {limit_bytes} bytes (`max_body_bytes`)")
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _request_id(scope: Scope) -> str:
    """The client's own, where it is one that headers and logs can carry; else a new one."""
    own = header_text(scope, b"x-request-id")
    usable = 0 < len(own) <= MAX_REQUEST_ID_CHARS and own.isascii() and own.isprintable()
    return own if usable else f"req-{random.getrandbits(128):032x}"


def _shown(word: str | None) -> str:
    """A client's or an engine's word, fit for one line of a log: it may be any text of any length."""
    if word is None:
        return "-"
    return word if len(word) <= MAX_NAME_CHARS and word.isprintable() else ascii(word[:MAX_NAME_CHARS])


def _engine_headers(scope: Scope, request_id: str) -> dict[str, str]:
    headers = {"content-type": "application/json", "x-request-id": request_id}
    fields = header_fields(scope)
    for name in TRACING:
        if name in fields:
            headers[name.decode()] = fields[name].decode("latin-1")
    return headers
