"""What the gateway itself writes into a request, and what that means for the answer.

Only these: the engine's name of the model; the usage option it meters by (hidden again when the client did not ask);
and on chat requests the adapter's own chat template and stop tokens. `priority` is taken out. Every other field goes
through as it came. Pure; knows no engine.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import from_json

from loradock_serve.errors import BadRequestError
from loradock_serve.splice import quoted, written
from loradock_serve.sse import StreamRewriter

CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, CLASSIFY = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/classify",
)
POOLED = frozenset({EMBEDDINGS, CLASSIFY})
"""Paths whose answers are numbers, not text."""


DECODER = json.JSONDecoder()
YES = frozenset({"1", "true", "t", "yes", "y", "on"})
SHORT_BYTES = 4096
"""Up to which Pydantic's JSON reader is three times as fast as json; with long texts it is slower."""


@dataclass(frozen=True)
class Behaviour:
    """What a version brings along besides weights."""

    chat_template: str | None = None
    """Its own chat template; None means the engine's."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end its answers, beside those that a request names."""


class Outgoing(NamedTuple):
    """A request on its way to the engine."""

    body: bytes
    streams: bool
    hide_usage: bool
    engine_name: str
    public_name: str

    def rewriter(self) -> StreamRewriter:
        """What rewrites the answer's events."""
        return StreamRewriter(model_field(self.engine_name), model_field(self.public_name), self.hide_usage)


def model_field(name: str) -> bytes:
    """`"model":"NAME"` as the engine's compact JSON has it. In a text inside JSON its quotes would be escaped: no
    false match."""
    return b'"model":' + quoted(name)


def parse_body(body: bytes) -> dict[str, Any]:
    """The request's JSON object; BadRequestError where it is none."""
    try:
        payload = _loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise BadRequestError("The body must be a JSON object", code="invalid_json")
    return payload


def _loads(body: bytes) -> Any:
    if len(body) <= SHORT_BYTES:
        with contextlib.suppress(ValueError):
            return from_json(body)
    # Standard JSON, and what Python's own reader takes besides: a byte order mark, UTF-16, half a character.
    if b"\0" not in body[:4]:  # json looks at each byte of these for an encoding, which costs as much as the rest
        with contextlib.suppress(UnicodeDecodeError):
            return json.loads(body.decode("utf-8-sig"))
    return json.loads(body)


def model_of(payload: Mapping[str, Any]) -> str:
    """The model that a request names; BadRequestError where it names none."""
    model = payload.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError("You must name a model: `GET /v1/models` lists what is served", param="model")
    return model


def outgoing(
    path: str,
    payload: Mapping[str, Any],
    engine_name: str,
    public_name: str,
    behaviour: Behaviour,
    body: bytes = b"",
) -> Outgoing:
    """The request as the engine is to get it; `body` is what `payload` was parsed from, if it still exists.

    Raises BadRequestError for what clients may not set.
    """
    _refuse_chat_template(payload)
    changes: dict[str, Any] = {}
    streams = _is_yes(payload.get("stream"))
    hide_usage = streams and path in (CHAT, COMPLETIONS) and not _asks_for_usage(payload)
    if hide_usage:
        changes["stream_options"] = _options(payload) | {"include_usage": True}
    if path == RESPONSES and behaviour.chat_template is not None:
        raise BadRequestError(
            f"{public_name!r} has a chat template of its own, which /v1/responses cannot apply: "
            "use /v1/chat/completions",
            param="model",
            code="chat_template_unsupported",
        )
    if (path == CHAT or (path in POOLED and "messages" in payload)) and behaviour.chat_template is not None:
        changes["chat_template"] = behaviour.chat_template
    if path not in POOLED and behaviour.stop_token_ids and payload.get("ignore_eos") is not True:
        changes["stop_token_ids"] = _stop_tokens(behaviour.stop_token_ids, payload.get("stop_token_ids"))
    # The gateway's queue minds the priority; engines refuse it.
    sent = written(body, payload, engine_name, changes, left_out="priority")
    return Outgoing(sent, streams, hide_usage, engine_name, public_name)


def _is_yes(value: Any) -> bool:
    """Whether an engine reads it as true: beside `true` it takes 1 and a few words."""
    if value is True or not value:
        return value is True
    return value.lower() in YES if isinstance(value, str) else value == 1


def _stop_tokens(own: tuple[int, ...], asked: Any) -> Any:
    """The adapter's, and those of the request beside them; what is no list stays for the engine to refuse."""
    if asked is None:
        return list(own)
    return [*own, *(token for token in asked if token not in own)] if isinstance(asked, list) else asked


def _refuse_chat_template(payload: Mapping[str, Any]) -> None:
    """The engine trusts templates, for the adapters' sake; it takes one from either of two places."""
    extra = payload.get("chat_template_kwargs")
    for param, template in (
        ("chat_template", payload.get("chat_template")),
        ("chat_template_kwargs", extra.get("chat_template") if isinstance(extra, dict) else None),
    ):
        if template is not None:
            raise BadRequestError(
                "A request cannot bring its own chat template on this server: push it with the adapter", param=param
            )


def _options(payload: Mapping[str, Any]) -> dict[str, Any]:
    options = payload.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequestError("`stream_options` must be an object", param="stream_options")
    return dict(options or {})


def _asks_for_usage(payload: Mapping[str, Any]) -> bool:
    options = _options(payload)
    return options.get("include_usage") is True or options.get("continuous_usage_stats") is True


def incoming(answer: bytes, out: Outgoing) -> tuple[bytes, Any]:
    """A whole (not streamed) answer with the public name in it, and its usage object (None where it has none)."""
    answer = answer.replace(model_field(out.engine_name), model_field(out.public_name))
    start = answer.rfind(b'"usage":{')
    if start < 0:
        return answer, None
    # The usage object stands near the end; reading just it spares parsing megabytes of embeddings.
    try:
        usage, _ = DECODER.raw_decode(answer[start + len(b'"usage":') :].decode())
    except ValueError:
        return answer, None
    return answer, usage


def engine_error(answer: bytes, out: Outgoing) -> dict[str, Any]:
    """The engine's error body as the client is to see it: OpenAI's shape, our names, `source: engine`."""
    try:
        data = json.loads(answer)
    except ValueError:
        data = {"message": answer.decode(errors="replace")[:2000]}
    return public_error(data.get("error", data) if isinstance(data, dict) else data, out)


def public_error(error: Any, out: Outgoing) -> dict[str, Any]:
    """An engine's error object, or whatever stands in its place, as the client is to see it."""
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = str(error.get("message", error.get("detail", error)))
    if out.engine_name.startswith("sha256:"):  # "base" is a word that a message may well hold
        message = message.replace(out.engine_name, out.public_name)
    return {
        "message": message,
        "type": error.get("type", "engine_error"),
        "param": error.get("param"),
        "code": error.get("code"),
        "source": "engine",
    }
