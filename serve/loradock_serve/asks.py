"""What an OpenAI request asks of admission: whose it is, how urgent, how many sequences, until when. Pure.

`priority` is read here and not forwarded: engines run their queue first come, first served, and refuse it.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from loradock_serve.errors import BadRequestError
from loradock_serve.tickets import Ask

ANONYMOUS = ""
"""The tenant of all requests that name none: they share one share."""
MAX_TENANT_CHARS = 64
BYTES_A_TOKEN = 4
MAX_PRIORITY = 2**31 - 1


def ask_of(payload: Mapping[str, Any], body_bytes: int, adapter: str | None, deadline_at: float | None = None) -> Ask:
    """What a request asks for. BadRequestError where its priority is none."""
    return Ask(
        tenant=tenant_of(payload),
        adapter=adapter,
        prompt_tokens=body_bytes / BYTES_A_TOKEN,
        seats=seats_of(payload),
        priority=priority_of(payload),
        deadline_at=deadline_at,
    )


def tenant_of(payload: Mapping[str, Any]) -> str:
    """Whose request it is: its `user`. The one place that changes when keys have owners.

    Clients choose the text, so a long one is replaced by its hash.
    """
    user = payload.get("user")
    if not isinstance(user, str):
        return ANONYMOUS
    if len(user) > MAX_TENANT_CHARS:
        return hashlib.blake2b(user.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return user


def caller_of(payload: Mapping[str, Any], key: str) -> str | None:
    """Who gets the same version of a split name each time: the request's `user`, else whose `key` it came with.

    None where neither says anything.
    """
    user = tenant_of(payload)
    if user != ANONYMOUS:
        return f"user {user}"
    return f"key {key}" if key else None


def priority_of(payload: Mapping[str, Any]) -> int:
    """Lower is earlier; 0 where the request says nothing."""
    priority = payload.get("priority")
    if priority is None:
        return 0
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise BadRequestError("`priority` must be a whole number of 32 bits; lower is earlier", param="priority")
    return priority


def seats_of(payload: Mapping[str, Any]) -> int:
    """How many sequences the engine makes of it: `n` for each prompt. What is malformed counts as one: the engine will
    say so."""
    copies = max(1, _whole(payload.get("n")) or 1)
    prompts = payload.get("prompt", payload.get("input"))
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        return copies * len(prompts)
    return copies


def check_n(payload: Mapping[str, Any], limit: int) -> None:
    """BadRequestError where one request wants so many answers that it would have the engine for itself for long."""
    for key in ("n", "best_of"):
        n = _whole(payload.get(key))
        if n is not None and n > limit:
            raise BadRequestError(
                f"`{key}` is {n}, over this server's limit of {limit} (`admission.max_n`): send several requests",
                param=key,
            )


def _whole(value: Any) -> int | None:
    """A number as engines read one: they also take `"3"` and `3.0` for 3. None for what is no whole number."""
    if isinstance(value, int):
        return value
    if not isinstance(value, str | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def timeout_of(header: str, limit_s: float) -> tuple[float, str]:
    """Seconds that a request may take, and what says so: its `x-request-timeout` where it has one, at most the
    server's limit."""
    if not header:
        return limit_s, "request_timeout_s"
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadRequestError(
            f"The header x-request-timeout must be seconds over 0, like 30 or 2.5, and is {header[:40]!r}",
            param="x-request-timeout",
        )
    return (seconds, "x-request-timeout") if seconds < limit_s else (limit_s, "request_timeout_s")
