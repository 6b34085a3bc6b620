"""Changes to a JSON object, written into its bytes where they stand instead of dumping the whole anew.

A prompt may be megabytes, and what changes is a name. The bytes are touched only where it is certain what they mean;
everything else is dumped. Both ways parse to the same (`tests/serve/test_splice.py`).
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

KEY = b'"model"'
# A key written with escapes would not be found by its letters: m, o, d, e and l all begin like this.
ESCAPED_LETTER = b"\\u006"
PLAIN_TEXT = re.compile(rb'\s*:\s*"[^"\\]*"')
SPACE = b" \t\r\n"


def written(
    body: bytes, parsed: Mapping[str, Any], model: str, changes: Mapping[str, Any], left_out: str | None = None
) -> bytes:
    """As JSON what `body` says, which is `parsed`, but for another model, these members and without that one."""
    spliced = _spliced(body, parsed, model, changes, left_out)
    if spliced is not None:
        return spliced
    wanted = {**parsed, "model": model, **changes}
    if left_out is not None:
        wanted.pop(left_out, None)
    return json.dumps(wanted).encode()


def _spliced(
    body: bytes, parsed: Mapping[str, Any], model: str, changes: Mapping[str, Any], left_out: str | None = None
) -> bytes | None:
    if left_out in parsed or "model" not in parsed or any(key in parsed for key in changes):
        return None
    place = _model_text(body)
    if place is None:
        return None
    start, end = place
    first = json.dumps(changes)[1:-1].encode() + b"," if changes else b""
    return b'{%b%b"model":%b%b' % (first, body[1:start], quoted(model), body[end:])


@lru_cache(maxsize=4096)
def quoted(name: str) -> bytes:
    """As a text in JSON."""
    return json.dumps(name).encode()


def _model_text(body: bytes) -> tuple[int, int] | None:
    """Where the member `"model": "…"` of the outermost object begins and ends in valid JSON; None where in doubt.

    A quote behind `{` or `,` begins a text: inside of one it would be escaped, and behind the end of one stands no
    letter. So `"model"` there, with a colon after it, is a key, and as the only one that is spelt so it is the
    outermost object's (which has one: the caller has seen it).
    """
    if body[:1] != b"{" or ESCAPED_LETTER in body or b"chat_template" in body:
        return None  # of two members of one name the last counts; where a template may hide, nobody is to differ on it
    start = body.find(KEY)
    if start < 0 or body.find(KEY, start + len(KEY)) >= 0:
        return None
    before = start - 1
    while body[before] in SPACE:
        before -= 1
    value = PLAIN_TEXT.match(body, start + len(KEY))
    return (start, value.end()) if value is not None and body[before] in b"{," else None
