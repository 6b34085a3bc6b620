"""Publishing a finished run, and measuring how long it takes from the push to the first token: RUN/push.json.

A push that fails costs nothing: the run is whole, and the command that pushes it is told. Imports nothing heavy.
"""

import json
import time
from pathlib import Path
from typing import Any

import httpx

from loradock_adapters.client import DEFAULT_SERVER, Client
from loradock_adapters.connection import RETRY_WAITS_S
from loradock_adapters.errors import LoradockError, UsageError

PUSH_FILE = "push.json"
ASKED = "The"
"""A prompt for its first token; what it says does not matter."""
FIRST_TOKEN_WITHIN_S = 300.0
"""An engine of its own has to start first."""


class PushFailedError(LoradockError):
    """The run is whole, but was not published."""

    code = "push_failed"


def push(
    run: str | Path,
    name: str,
    *,
    server: str = DEFAULT_SERVER,
    api_key: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> dict[str, Any]:
    """Publish a run's checkpoint and ask it for one token; returns what stands in push.json.

    `first_token_s` there is the time from the start of the push to that token, None (with `why`) where it did not come.
    Raises PushFailedError, with the server's reasons and the command that tries again.
    """
    run = Path(run)
    started_s = time.monotonic()
    try:
        with Client(server, api_key, transport=transport, retry_waits_s=RETRY_WAITS_S[:3]) as client:
            answer = client.push(run, name)
    except LoradockError as error:
        again = f"loradock push {run} {name} --server {server}"
        raise PushFailedError(f"{run} is whole, but was not published: {error}\ntry again with\n    {again}") from error
    pushed_s = time.monotonic() - started_s
    why = ask_for_a_token(server, name, api_key, transport)
    record = {
        "name": answer.get("name", name),
        "version": answer.get("version"),
        "digest": answer.get("digest"),
        "placement": answer.get("placement"),
        "server": server,
        "push_s": round(pushed_s, 3),
        "first_token_s": round(time.monotonic() - started_s, 3) if why is None else None,
        "why": why,
    }
    (run / PUSH_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def ask_for_a_token(
    server: str, name: str, api_key: str | None, transport: httpx.BaseTransport | None = None
) -> str | None:
    """Has the model say one token. Returns None, or why there was none."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
    body = {"model": name, "prompt": ASKED, "max_tokens": 1, "temperature": 0}
    try:
        with httpx.Client(transport=transport, timeout=FIRST_TOKEN_WITHIN_S) as client:
            answer = client.post(f"{server.rstrip('/')}/v1/completions", json=body, headers=headers)
            if answer.status_code != httpx.codes.OK:
                return f"HTTP {answer.status_code}: {answer.text[:200]}"
            return None if answer.json().get("choices") else "an answer without a choice"
    except (httpx.HTTPError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def check_push(name: str | None, server: str) -> None:
    """What can be refused before the run begins: a name that is none, an address that is none. Raises UsageError."""
    from loradock_adapters.names import check_name

    if name is None:
        return
    check_name(name)
    if not server.startswith(("http://", "https://")):
        raise UsageError(f"--server {server!r} is no address; for example {DEFAULT_SERVER}")


def told(record: dict[str, Any]) -> str:
    """One line for people."""
    first = record["first_token_s"]
    came = f"first token {first:.2f} s after the push began" if first is not None else f"no token yet: {record['why']}"
    return f"pushed as {record['name']}@{record['version']} ({record['placement']}) in {record['push_s']:.2f} s; {came}"
