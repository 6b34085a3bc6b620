"""Changes to a JSON object, written into its bytes where they stand instead of dumping the whole anew.

A prompt may be megabytes, and what changes is a name. The bytes are touched only where it is certain what they mean;
everything else is dumped. Both ways parse to the same (`tests/serve/test_splice.py`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

KEY = b'"model"'
# A key written with escapes would not be found by its letters: m, o, d, e and l all begin like this.
ESCAPED_LETTER = b"\\u006"
PLAIN_TEXT = re.compile(rb'\s*:\s*"[^"\\]*"')
SPACE = b" \t\r\n"


def written(body: bytes, parsed: Mapping[str, Any], wanted: Mapping[str, Any]) -> bytes:
    """`wanted` as JSON, where `parsed` is what `body` says. Values that both share are the same objects."""
    spliced = _spliced(body, parsed, wanted)
    return spliced if spliced is not None else json.dumps(wanted).encode()


def _spliced(body: bytes, parsed: Mapping[str, Any], wanted: Mapping[str, Any]) -> bytes | None:
    added = {}
    for key, value in wanted.items():
        if key not in parsed:
            added[key] = value
        elif value is not parsed[key] and key != "model":
            return None
    if len(wanted) != len(parsed) + len(added) or "model" not in parsed:
        return None  # something goes away
    place = _model_text(body)
    if place is None:
        return None
    start, end = place
    first = json.dumps(added)[1:-1].encode() + b"," if added else b""
    return b'{%b%b"model":%b%b' % (first, body[1:start], json.dumps(wanted["model"]).encode(), body[end:])


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
