"""A stream of server-sent events on its way from the engine to the client: passed through, with the least rewriting.

Bytes go out as they came, whole events at a time, but for three things: the model's public name, the usage figures
that the gateway asked for and the client did not, and what follows an engine's error. Knows nothing of sockets.
"""

import json
from dataclasses import dataclass, field
from typing import Any

DONE = b"[DONE]"
END = b"\n\n"


@dataclass
class Usage:
    """Token counts of one answer, from the engine's own figures."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, usage: Any) -> None:
        """Read an OpenAI usage object, of either API; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
        if isinstance(prompt, int):
            self.prompt_tokens = prompt
            self.completion_tokens = completion if isinstance(completion, int) else 0


@dataclass
class StreamRewriter:
    """Feed it the engine's bytes with `feed()`, send on what it returns; look at `ended_well` at the end."""

    engine_name: bytes
    """`"model":"…"` as the engine writes it."""
    public_name: bytes
    """`"model":"…"` as the client is to see it."""
    hide_usage: bool
    """The client did not ask for the usage chunk."""
    usage: Usage = field(default_factory=Usage)
    done: bool = False
    """The stream's own end was seen: `[DONE]`, or a Responses API event that ends a response."""
    error: dict[str, Any] | None = None
    """An error event of the engine, which the caller answers with one of its own; nothing after it is passed on."""
    _pending: bytes = b""

    @property
    def ended_well(self) -> bool:
        """Whether the stream was complete."""
        return self.done and self.error is None

    def feed(self, chunk: bytes) -> bytes:
        """Whole events of `chunk` and what was pending, rewritten; an incomplete one waits for its rest."""
        if self.error is not None:
            return b""
        data = self._pending + chunk if self._pending else chunk
        if b"\r" in data:
            data, held = _with_plain_line_ends(data)
        else:
            held = b""
        cut = data.rfind(END)
        if cut < 0:
            self._pending = data + held
            return b""
        cut += len(END)
        self._pending = data[cut:] + held
        return self._rewrite(data[:cut])

    def _rewrite(self, block: bytes) -> bytes:
        block = block.replace(self.engine_name, self.public_name)
        # One look for the rare marks on the whole block keeps the common case at two passes over the bytes.
        if b'"usage"' not in block and DONE not in block and b"error" not in block and b"event: response." not in block:
            return block
        events = (self._one(event) for event in block.split(END)[:-1])
        return b"".join(event + END for event in events if event is not None)

    def _one(self, event: bytes) -> bytes | None:
        """One event as it is to be sent; None to leave it out."""
        if self.error is not None:
            return None
        if event.endswith(DONE) and event.strip().removeprefix(b"data:").strip() == DONE:
            self.done = True
            return event
        name, data = _parts(event)
        if data is None:
            return event
        if _is_error(name, data):
            error = data.get("error", data)
            self.error = error if isinstance(error, dict) else {"message": str(error)}
            return None
        if name in (b"response.completed", b"response.incomplete", b"response.failed"):
            self.done = True
            response = data.get("response")
            self.usage.take(response.get("usage") if isinstance(response, dict) else None)
            return event
        if "usage" in data:
            return self._with_usage(event, data)
        return event

    def _with_usage(self, event: bytes, data: dict[str, Any]) -> bytes | None:
        self.usage.take(data["usage"])
        if not self.hide_usage:
            return event
        if data.get("choices") == []:
            return None
        rest = {key: value for key, value in data.items() if key != "usage"}
        return b"data: " + json.dumps(rest, separators=(",", ":")).encode()


def _with_plain_line_ends(data: bytes) -> tuple[bytes, bytes]:
    """`\\n` for the two other line ends that the format allows, and a `\\r` at the end that may be half of one.

    In JSON a carriage return is always escaped, so every bare one ends a line.
    """
    held = b"\r" if data.endswith(b"\r") else b""
    data = data[: len(data) - len(held)]
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), held


def _parts(event: bytes) -> tuple[bytes, dict[str, Any] | None]:
    """The event's name and its JSON object; None where it has none."""
    name, payload = b"", b""
    for line in event.split(b"\n"):
        if line.startswith(b"event:"):
            name = line[6:].strip()
        elif line.startswith(b"data:"):
            payload += line[5:]
    if (
        b'"usage"' not in payload
        and b'"error"' not in payload
        and not name.startswith(b"response.")
        and name != b"error"
    ):
        return name, None
    try:
        data = json.loads(payload)
    except ValueError:
        return name, None
    return name, data if isinstance(data, dict) else None


def _is_error(name: bytes, data: dict[str, Any]) -> bool:
    return name == b"error" or (
        isinstance(data.get("error"), dict) and "choices" not in data and "response" not in data
    )


def error_event(error: dict[str, Any]) -> bytes:
    """The event that ends a stream which cannot go on: the OpenAI client raises `APIError` from it."""
    return b"data: " + json.dumps({"error": error}, separators=(",", ":")).encode() + END


def comment(text: str) -> bytes:
    """A comment line, which clients ignore and proxies count as life."""
    return b": " + text.replace("\n", " ").encode() + END
